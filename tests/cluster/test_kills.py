"""SIGKILL of prefill and decode workers at every stage of a hand-over.

Over NCCL where there are two GPUs; over gloo with all workers on the one GPU that there is, or on CPUs. There two kills
run, and all ten with `pytest tests/cluster --every-kill`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from baton.chaos.load import Stream
from baton.common.config import BatonConfig
from benchmarks.transfer.children import gpus
from tests.cluster.deaths import DEATHS
from tests.cluster.kills import KillRun, Outcome, Victim, kill_run
from tests.support.oracle import GreedyOracle
from tests.support.tiny_model import make_tiny_llama

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

GPUS = gpus()
ON_GPUS = len(GPUS) > 0
VICTIMS = [Victim(role, death) for death in DEATHS for role in ("prefill", "decode")]
# On CPUs, which CI has: of each role the one that most depends on. Prefill dies while both ends are in an operation, so
# decode has to abort it, to quarantine what it may write to and to free its leases; decode dies with all of the KV and
# without the commit, so prefill holds blocks for nobody and streams with a first token have to move.
ON_CPUS = [Victim("prefill", "sending"), Victim("decode", "commit")]
DTYPES = ["float32", "bfloat16"] if ON_GPUS else ["float32"]
STALL_S = 3.0 if ON_GPUS else 20.0  # CPUs that other work shares
MAX_LEAK_BYTES = 64 << 20


def config(model: Path, dtype: str) -> BatonConfig:
    """Small chunks, so that a prompt takes several."""
    return BatonConfig.model_validate(
        {
            "model": str(model),
            "server": {"port": 0, "grpc_port": 0},
            "cluster": {"device": "cuda" if ON_GPUS else "cpu", "worker_host": "127.0.0.1"},
            "engine": {"dtype": dtype, "max_num_batched_tokens": 128, "max_num_seqs": 32, "num_blocks": 1024},
            "transfer": {
                "backend": "auto" if len(GPUS) > 1 else "gloo",
                "window": 3,
                "slot_bytes": 65536,
                "layer_groups": 3,
                "connect_timeout_s": 4.0,
            },
            "router": {"policy": "remote"},
        }
    )


async def test_survivors_of_every_kill_serve_on(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    victims = VICTIMS if ON_GPUS or request.config.getoption("--every-kill", default=False) else ON_CPUS
    if victims is ON_CPUS:
        print(f"{len(ON_CPUS)} of {len(VICTIMS)} kills, to keep CI without GPUs short; --every-kill runs all of them")
    await kill_and_check(tmp_path, victims, DTYPES)


async def kill_and_check(tmp_path: Path, victims: Sequence[Victim], dtypes: Sequence[str]) -> None:
    """The victims die one after the other, in a run for each dtype, side by side."""
    torch.set_num_threads(1)
    shape = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 6} if ON_GPUS else {}
    model = make_tiny_llama(tmp_path / "tiny", **shape)
    async with AsyncExitStack() as stack:
        starting = [stack.enter_async_context(kill_run(config(model, dtype), GPUS, victims)) for dtype in dtypes]
        runs = await asyncio.gather(*starting)
        await asyncio.gather(*(run.warm_up() for run in runs))
        before = await runs[0].memory()
        outcomes = [outcome for done in await asyncio.gather(*(kill_all(run) for run in runs)) for outcome in done]
        after = await memory_again(runs[0], before)
        print(f"free GPU memory: {mib(before)} MiB before, {mib(after)} MiB after {len(outcomes)} kills")
        for run, dtype in zip(runs, dtypes, strict=True):
            await check_tokens(run, model, dtype)
        healths = [await worker.stop() for run in runs for worker in (run.prefill, run.decode)]
    assert all(health["healthy"] for health in healths), healths
    for outcome in outcomes:
        assert (outcome.stall_s or 0.0) < STALL_S, outcome
        assert outcome.other_stall_s < STALL_S, outcome
        assert outcome.fresh_s < STALL_S, outcome
    for was, now in zip(before, after, strict=True):
        assert was - now <= MAX_LEAK_BYTES, f"{(was - now) >> 20} MiB are gone"


async def kill_all(run: KillRun) -> list[Outcome]:
    """One after the other."""
    await asyncio.gather(*(victim.serve() for victim in run.victims))
    outcomes = [told(await run.kill(victim), run.config.engine.dtype) for victim in run.victims]
    assert sum(outcome.num_moved for outcome in outcomes) > 0, "no stream had to move: the kills missed"
    assert not [stream.error for stream in run.streams if stream.error]
    return outcomes


def told(outcome: Outcome, dtype: str) -> Outcome:
    stall = "no stream" if outcome.stall_s is None else f"{outcome.num_moved} streams, stall {outcome.stall_s:.2f} s"
    print(f"{dtype}: {outcome.victim.role} killed at {outcome.victim.death}: moved {stall};", end=" ")
    print(f"others {outcome.other_stall_s:.2f} s; a new request complete after {outcome.fresh_s:.2f} s;", end=" ")
    print(f"at rest after {outcome.rest_s:.1f} s", flush=True)
    return outcome


async def memory_again(run: KillRun, before: tuple[int, int]) -> tuple[int, int]:
    """Free bytes once set-ups that were left alone have run into their deadline, at most 10 s from now."""
    deadline = time.monotonic() + 10.0
    while True:
        after = await run.memory()
        is_back = all(was - now <= MAX_LEAK_BYTES for was, now in zip(before, after, strict=True))
        if is_back or time.monotonic() > deadline:
            return after
        await asyncio.sleep(0.2)


def mib(sizes: tuple[int, int]) -> list[int]:
    return [size >> 20 for size in sizes]


async def check_tokens(run: KillRun, model: Path, dtype: str) -> None:
    """float32: greedy streams against transformers in float64, sampled ones against the same request undisturbed.

    bfloat16 depends on who shares a batch: how many streams differ is told, of those that moved and of others.
    """
    lengths = {len(stream.token_ids) - stream.job.max_tokens for stream in run.streams}
    assert lengths == {0}, f"streams with a token missing or doubled: {lengths}"
    if dtype == "float32":
        oracle = GreedyOracle.load(model)
        for stream in run.streams:
            if stream.job.temperature == 0:
                oracle.check(list(stream.job.prompt), stream.token_ids)
        print(f"{oracle.checked_tokens} greedy tokens checked, {oracle.near_ties} near-ties")
        assert await num_different(run, [one for one in run.moved if one.job.temperature > 0]) == 0
        return
    stayed = [stream for stream in run.streams if stream not in run.moved][-max(20, len(run.moved)) :]
    for name, streams in (("moved", run.moved), ("undisturbed", stayed)):
        different = await num_different(run, streams)
        print(f"bfloat16: {different} of {len(streams)} {name} streams differ from the same request sent again")


async def num_different(run: KillRun, streams: list[Stream]) -> int:
    again = await asyncio.gather(*(run.again(stream) for stream in streams))
    return sum(first.token_ids != second.token_ids for first, second in zip(streams, again, strict=True))
