"""Many hand-overs that end in every way, at the same time, over connections that break: no part remembers any of them.

The counts of blocks and slots are looked at elsewhere too; here also what the parts keep in their tables, where a leak
costs nothing for days.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from baton.common.config import ChaosConfig, EngineConfig, FaultSettings, TransferConfig
from baton.worker.shell import WorkerShell
from decode_worker.handover import DecodeHalf
from prefill_worker.handover import PrefillHalf
from protos import worker_pb2 as pb
from tests.transfer.handover_cluster import Cluster, cluster, config, prompt, spec

pytestmark = pytest.mark.slow
NUM_REQUESTS, AT_ONCE = 60, 10
WAIT_S = 20.0
WAYS = ("whole", "whole", "whole", "one token", "open only", "early", "late", "unknown lease", "twice", "deadline")


async def run(workers: Cluster, number: int, rng: random.Random) -> str:
    """One request, ended in some way; returns which. What a broken connection ends is not gone into."""
    way, name = rng.choice(WAYS), f"r{number}"
    request = spec(prompt(rng.randint(1, 200), seed=number), 1 if way == "one token" else rng.randint(2, 12))
    if way == "deadline":
        request.deadline_s = rng.uniform(0.001, 0.3)
    prefill, decode = workers.to_prefill, workers.to_decode
    if way == "early":
        await decode.open(name, request, workers.prefill.worker_id)
        await asyncio.gather(decode.cancel(name), prefill.cancel(name))
        return way
    reserved = await _reserved(workers, name, request)
    if reserved is None or way == "open only":
        return "open only"
    key = (name, reserved.key.attempt)
    if way == "unknown lease":
        reserved = pb.Reserved(lease=reserved.lease + 1000, generation=reserved.generation)
    for _ in range(2 if way == "twice" else 1):
        await prefill.prefill(name, request, workers.decode.worker_id, reserved, key[1])
    wanted = rng.randint(0, 3) if way == "late" else request.max_tokens
    await _until_over(workers, key, lambda: len(decode.tokens[key]) >= wanted)
    finished = key in decode.finish_reasons
    await asyncio.gather(decode.cancel(*key), prefill.cancel(*key))
    if not finished:
        return f"{way}, cut short"
    tokens = prefill.in_order(key) + decode.in_order(key)
    assert tokens == await workers.local(f"l{number}", request), f"wrong tokens of {name}, {way}"
    return way


async def _reserved(workers: Cluster, name: str, request: pb.RequestSpec) -> pb.Reserved | None:
    """Tries until there is room and a connection."""
    decode = workers.to_decode
    for attempt in range(1, 500):
        key = await decode.open(name, request, workers.prefill.worker_id, attempt)
        await decode.until(lambda key=key: key in {*decode.reserved, *decode.refused, *decode.failed}, "an answer")  # type: ignore[misc]
        if key in decode.reserved:
            return decode.reserved[key]
        if key in decode.failed:
            break
        await asyncio.sleep(0.02)
    return None


async def _until_over(workers: Cluster, key: tuple[str, int], enough: Any) -> None:
    clients = (workers.to_prefill, workers.to_decode)
    async with asyncio.timeout(WAIT_S):
        while not enough():
            if any(key in ended for one in clients for ended in (one.failed, one.refused, one.finish_reasons)):
                return
            await asyncio.sleep(0.01)


def _half(shell: WorkerShell, kind: type[Any]) -> Any:
    [half] = [half for half in shell._halves if isinstance(half, kind)]
    return half


def _remembered(workers: Cluster) -> dict[str, object]:
    """What is left in any table, by name."""
    prefill, decode = _half(workers.prefill, PrefillHalf), _half(workers.decode, DecodeHalf)
    tables: dict[str, object] = {
        "hand-overs": prefill._handovers,
        "written": prefill._written_at,
        "gate": (*prefill._gate._held, *prefill._gate._held_by, *prefill._gate._waiting),
        "leases": decode._leases,
        "open leases": decode.timeline._leases,
        "open chunks": decode.timeline._open,
        "protocol's attempts": list(prefill._protocol.state.attempts.values()),
        "protocol's leases": list(decode._protocol.state.leases.values()),
        "dead epochs": [*prefill._pairs._pairs][1:] + [*decode._pairs._pairs][1:] + [*decode._credited][1:],
        "staging": [pool.in_use for half in (prefill, decode) for pool in half._pairs._staging.values() if pool.in_use],
    }
    for link in (*prefill._protocol.state.links.values(), *decode._protocol.state.links.values()):
        tables[f"flights {link.epoch}"] = (*link.flights, *getattr(link, "queue", ()))
    for shell in (workers.prefill, workers.decode):
        engine: Any = shell._engine
        book = engine._book
        tables[f"attempts of {shell.worker_id}"] = shell._attempts._live
        tables[f"engine of {shell.worker_id}"] = (*book._requests, *book._reserved, *book._retiring)
        tables[f"blocks of {shell.worker_id}"] = (*engine._pool._holdings, *engine._scheduler._seats)
    return {name: table for name, table in tables.items() if table}


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_remembered(model: Path, seed: int) -> None:
    rng = random.Random(f"leaks {seed}")
    faults = FaultSettings(frame_duplication=0.1, frame_jitter_s=0.01, corruption=0.01)
    disturbed = config(
        model,
        engine=EngineConfig(max_num_batched_tokens=48, max_num_seqs=8, num_blocks=100),
        transfer=TransferConfig(window=3, slot_bytes=16384, operation_timeout_s=1.0, lease_s=2.0),
        chaos=ChaosConfig(enabled=True, seed=seed, faults=faults),
    )
    async with cluster(disturbed) as workers:
        await workers.connect()
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> str:
            async with turns:
                if number in (15, 30, 45):
                    for pair in _half(workers.decode, DecodeHalf)._pairs.of_peer(workers.prefill.worker_id):
                        pair.end("cut by the test")
                return await run(workers, number, rng)

        ways = await asyncio.gather(*(one(number) for number in range(NUM_REQUESTS)))
        assert {"whole", "one token, cut short", "early", "late, cut short"} <= set(ways), ways
        await workers.at_rest()
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while remembered := _remembered(workers):
            assert asyncio.get_running_loop().time() < deadline, remembered
            await asyncio.sleep(0.05)
