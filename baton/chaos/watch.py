"""The invariants of the blocks (I4), watched through /metrics while a chaos run lasts and checked at rest after it."""

from __future__ import annotations

import asyncio
import time

import httpx

from baton.chaos.cluster import BUSY, STATES, Blocks, Size, TargetCluster

_PERIOD_S = 0.2


class BlockWatch:
    """`violations` names each worker whose block states did not add up to its total, once per worker."""

    def __init__(self, cluster: TargetCluster) -> None:
        self.violations: dict[str, str] = {}
        self.num_looks = 0
        self._cluster = cluster

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_PERIOD_S)

    async def look(self) -> Blocks:
        try:
            blocks = await self._cluster.blocks()
        except httpx.TransportError:
            return {}  # a look that did not come off; what is wrong with the server, its clients notice
        self.num_looks += 1
        for worker, states in blocks.items():
            if sum(states[state] for state in STATES) != states["total"]:
                self.violations.setdefault(worker, f"blocks of {worker} do not add up: {states}")
        return blocks


def in_use(blocks: Blocks) -> int:
    return int(sum(states.get(state, 0) for states in blocks.values() for state in BUSY))


async def until_complete(cluster: TargetCluster, size: Size, timeout_s: float, gone: frozenset[str]) -> float | None:
    """Seconds until all workers are attached and connected and none is one of `gone`; None if that takes longer."""
    start = time.monotonic()
    while time.monotonic() < start + timeout_s:
        if await cluster.is_complete(size, gone):
            return time.monotonic() - start
        await asyncio.sleep(0.05)
    return None


async def until_at_rest(watch: BlockWatch, timeout_s: float) -> tuple[float, int]:
    """Seconds until no block and no slot is in use, and how many still are where that takes longer than allowed."""
    start, left = time.monotonic(), -1
    while time.monotonic() < start + timeout_s:
        left = in_use(await watch.look())
        if left == 0:
            break
        await asyncio.sleep(0.1)
    return time.monotonic() - start, left
