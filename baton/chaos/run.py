"""One chaos run from plan to verdict."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from baton.chaos.cluster import Size, TargetCluster, model_directory, target_cluster
from baton.chaos.faults import FaultSeries, Injection
from baton.chaos.load import Client, Jobs, Stream, run_load
from baton.chaos.plan import ChaosPlan
from baton.chaos.reference import Reference
from baton.chaos.watch import BlockWatch, until_at_rest, until_complete
from baton.common.errors import BatonError
from baton.engine.models.config import load_model_config

_BYTES = 256  # token ids of prompts stay below special tokens of a byte-level vocabulary
_LOOK_S, _MAX_LOOKS = 0.2, 75  # for the end of the last processes


@dataclass(slots=True)
class Result:
    """What happened. `problems` are violations other than lost requests and wrong tokens, each in one line.

    `attempts` counts the router's attempts, also those of clients that disconnected, by outcome.
    """

    streams: list[Stream] = field(default_factory=list)
    faults: list[Injection] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    wrong: dict[int, str] = field(default_factory=dict)
    near_ties: dict[int, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)
    fenced_frames: int = 0
    load_s: float = 0.0
    at_rest_s: float = 0.0
    blocks_leaked: int = 0
    processes_left: int = 0
    num_tokens: int = 0

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.wrong or self.problems or self.blocks_leaked or self.processes_left)


def run_plan(plan: ChaosPlan, announce: Callable[[str], None]) -> Result:
    """Raises ConfigError for a wrong setting and BatonError where the cluster does not come up at all."""
    with model_directory(plan) as model:
        result = asyncio.run(_run(plan, model, announce))
        torch.set_num_threads(1)  # the forwards are too small to share
        announce(f"load over after {result.load_s:.0f} s; judging {len(result.streams)} requests")
        judge(result, Reference(model))
    return result


async def _run(plan: ChaosPlan, model: Path, announce: Callable[[str], None]) -> Result:
    result = Result()
    async with target_cluster(plan, model, announce) as cluster:
        await disturb(plan, cluster, min(load_model_config(model).vocab_size, _BYTES), result)
    result.processes_left = await _processes_left(cluster)
    return result


async def _processes_left(cluster: TargetCluster) -> int:
    for _ in range(_MAX_LOOKS):
        if not cluster.processes():
            break
        await asyncio.sleep(_LOOK_S)
    return len(cluster.processes())


async def disturb(plan: ChaosPlan, cluster: TargetCluster, vocab_size: int, result: Result) -> None:
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
    try:
        await _load_with_faults(plan, client, series, Jobs(plan.load, plan.seed, vocab_size), result)
        result.load_s = time.monotonic() - start
        await series.recovered()
        await _recover(plan, cluster, size, watch, result)
        result.attempts, result.fenced_frames = await cluster.attempts()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await client.close()
    result.problems += watch.violations.values()


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


def judge(result: Result, reference: Reference) -> None:
    """Fill in what was lost and what was wrong, by the index of the stream."""
    for index, stream in enumerate(result.streams):
        if stream.error:
            result.lost[index] = f"{stream.request_id or 'unnamed'}: {stream.error}"
        if stream.token_ids:
            _judge_tokens(result, index, stream, reference)
        if not stream.error and (problem := _miscounted(stream)):
            result.wrong[index] = f"{stream.request_id}: {problem}"


def _judge_tokens(result: Result, index: int, stream: Stream, reference: Reference) -> None:
    job = stream.job
    verdict = reference.judge(job.prompt, stream.token_ids, job.temperature, job.seed)
    result.num_tokens += len(stream.token_ids)
    if verdict.near_ties:
        result.near_ties[index] = verdict.near_ties
    if verdict.wrong_at is not None:
        how = "greedy" if job.temperature == 0 else "sampled"
        result.wrong[index] = (
            f"{stream.request_id}: {how} token {verdict.wrong_at} of {len(stream.token_ids)} after a prompt of "
            f"{len(job.prompt)} is not the model's, by {verdict.margin:.3g}"
        )


def _miscounted(stream: Stream) -> str:
    """Usage is counted once, across all attempts (I7)."""
    job, num_tokens = stream.job, len(stream.token_ids)
    if num_tokens != job.max_tokens:
        return f"{num_tokens} tokens instead of {job.max_tokens}"
    if (stream.prompt_tokens, stream.completion_tokens) != (len(job.prompt), num_tokens):
        return f"usage says {stream.prompt_tokens} + {stream.completion_tokens}, not {len(job.prompt)} + {num_tokens}"
    return "" if stream.finish_reason == "length" else f"finish reason {stream.finish_reason}"
