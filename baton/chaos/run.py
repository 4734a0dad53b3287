"""One chaos run from plan to verdict."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from baton.chaos.cluster import Size, TargetCluster, model_directory, target_cluster
from baton.chaos.faults import FaultSeries
from baton.chaos.judge import Judge
from baton.chaos.load import Client, Jobs, run_load
from baton.chaos.plan import ChaosPlan
from baton.chaos.reference import Reference
from baton.chaos.result import Result
from baton.chaos.watch import BlockWatch, until_at_rest, until_complete
from baton.common.errors import BatonError
from baton.engine.models.config import load_model_config

_BYTES = 256  # token ids of prompts stay below special tokens of a byte-level vocabulary
_SAY_S = 30.0
_LOOK_S, _MAX_LOOKS = 0.2, 75  # for the end of the last processes


def run_plan(plan: ChaosPlan, announce: Callable[[str], None]) -> Result:
    """Raises ConfigError for a wrong setting and BatonError where the cluster does not come up at all."""
    with model_directory(plan) as model:
        torch.set_num_threads(1)  # the forwards are too small to share
        judge = Judge(model, Reference(model, plan.limits.near_tie))
        result = asyncio.run(_run(plan, model, announce))
        announce(f"judging {len(result.streams)} requests")
        judge.judge(result, announce)
    return result


async def _run(plan: ChaosPlan, model: Path, announce: Callable[[str], None]) -> Result:
    result = Result()
    async with target_cluster(plan, model, announce) as cluster:
        await disturb(plan, cluster, min(load_model_config(model).vocab_size, _BYTES), result, announce)
    result.processes_left = await _processes_left(cluster)
    return result


async def _processes_left(cluster: TargetCluster) -> int:
    for _ in range(_MAX_LOOKS):
        if not cluster.processes():
            break
        await asyncio.sleep(_LOOK_S)
    return len(cluster.processes())


async def disturb(
    plan: ChaosPlan, cluster: TargetCluster, vocab_size: int, result: Result, announce: Callable[[str], None]
) -> None:
    """Load with faults, then recovery and rest. `result` is complete but for the judgement of tokens."""
    size = await cluster.size()
    name = await cluster.model_name()
    watch = BlockWatch(cluster)
    client = Client(cluster.url, name, plan.load.timeout_s)
    rng = random.Random(f"faults {plan.seed}")
    series = FaultSeries(
        cluster, size, client, Jobs(plan.load, plan.seed + 1, vocab_size), rng, plan.limits.recover_s, result.faults
    )
    start = time.monotonic()
    watching = asyncio.create_task(watch.run(), name="watch blocks")
    saying = asyncio.create_task(_say(result, announce), name="say how far")
    try:
        await _load_with_faults(plan, client, series, Jobs(plan.load, plan.seed, vocab_size), result)
        result.load_s = time.monotonic() - start
        announce(f"load over after {result.load_s:.0f} s: {len(result.streams)} requests")
        await series.recovered()
        await _recover(plan, cluster, size, watch, result)
        result.attempts, result.paths, result.fenced_frames = await cluster.counts()
    finally:
        watching.cancel()
        saying.cancel()
        await asyncio.gather(watching, saying, return_exceptions=True)
        await client.close()
    result.problems += watch.violations.values()


async def _say(result: Result, announce: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(_SAY_S)
        broken = sum(bool(stream.error) for stream in result.streams)
        announce(f"{len(result.streams)} requests ended, {broken} of them lost; {len(result.faults)} faults")


async def _load_with_faults(plan: ChaosPlan, client: Client, series: FaultSeries, jobs: Jobs, result: Result) -> None:
    """Ends with the load and the faults that end. Raises the BatonError of a fault that could not be done."""
    start = time.monotonic()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [(fault, group.create_task(series.run(fault, start), name=fault.kind)) for fault in plan.faults]
            load = group.create_task(run_load(client, plan.load, jobs, result.streams), name="load")
            await asyncio.wait({load, *(task for fault, task in tasks if fault.count is not None)})
            for fault, task in tasks:
                if fault.count is None:
                    task.cancel()
    except* BatonError as failed:
        raise failed.exceptions[0] from None


async def _recover(plan: ChaosPlan, cluster: TargetCluster, size: Size, watch: BlockWatch, result: Result) -> None:
    limits = plan.limits
    if await until_complete(cluster, size, limits.recover_s, frozenset()) is None:
        result.problems.append(f"the cluster was not complete {limits.recover_s:g} s after the load")
    result.at_rest_s, result.blocks_leaked = await until_at_rest(watch, limits.at_rest_s)
