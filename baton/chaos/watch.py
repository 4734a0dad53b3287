"""The invariants of the blocks (I4), watched through /metrics while a chaos run lasts and checked at rest after it."""

from __future__ import annotations

import asyncio
import contextlib
import time

import httpx

from baton.chaos.cluster import BUSY, STATES, Blocks, Size, TargetCluster

_PERIOD_S, _REST_PERIOD_S, _COMPLETE_PERIOD_S = 0.5, 0.1, 0.2
HOLD_S = 0.6


class BlockWatch:
    """`violations` names each worker whose block states did not add up to its total, once per worker."""

    def __init__(self, cluster: TargetCluster) -> None:
        self.violations: dict[str, str] = {}
        self.num_looks = 0
        self._cluster = cluster

    async def run(self) -> None:
        """Look until cancelled. A look that does not come off is left to the clients to notice."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                await self.look()
            await asyncio.sleep(_PERIOD_S)

    async def look(self) -> Blocks:
        """Raises httpx.TransportError."""
        blocks = await self._cluster.blocks()
        self.num_looks += 1
        for worker, states in blocks.items():
            if sum(states[state] for state in STATES) != states["total"]:
                self.violations.setdefault(worker, f"blocks of {worker} do not add up: {states}")
        return blocks


def in_use(blocks: Blocks) -> int:
    return int(sum(states.get(state, 0) for states in blocks.values() for state in BUSY))


async def until_complete(cluster: TargetCluster, size: Size, timeout_s: float, gone: frozenset[str]) -> float | None:
    """Seconds until all workers are attached and connected and none is one of `gone`; None if that takes longer.

    A server that does not answer now is not complete now.
    """
    start = time.monotonic()
    while time.monotonic() < start + timeout_s:
        with contextlib.suppress(httpx.HTTPError):
            if await cluster.is_complete(size, gone):
                return time.monotonic() - start
        await asyncio.sleep(_COMPLETE_PERIOD_S)
    return None


async def until_at_rest(watch: BlockWatch, timeout_s: float) -> tuple[float, int]:
    """Seconds until no block and no slot is in use, and how many still are where that takes longer than allowed.

    What a look shows is as old as the workers' last heartbeats, so it must stay so for HOLD_S.
    """
    start = free_since = time.monotonic()
    while True:
        left, now = in_use(await watch.look()), time.monotonic()
        if left and now > start + timeout_s:
            return now - start, left
        if left:
            free_since = now
        elif now >= free_since + HOLD_S:
            return free_since - start, 0
        await asyncio.sleep(_REST_PERIOD_S)
