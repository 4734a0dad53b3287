"""A cluster under test as its clients see it, and the transformers oracle for what it says."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from baton.chaos.cluster import Size, TargetCluster, Worker
from baton.chaos.judge import Judge
from baton.chaos.load import Client, Job, Stream
from baton.chaos.result import Result
from baton.chaos.watch import BlockWatch, until_at_rest, until_complete
from baton.common.config import FaultSettings
from tests.support.http import SHORT_LIVED
from tests.support.oracle import GreedyOracle

WAIT_S = 30.0
COMPLETE_S = 60.0


def job(prompt_length: int, max_tokens: int, seed: int = 0, temperature: float = 0.0) -> Job:
    prompt = random.Random(f"{seed} {prompt_length}").choices(range(256), k=prompt_length)
    return Job(tuple(prompt), max_tokens, temperature, seed)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> float:
    """Wait, bounded, until `condition` holds; the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + timeout_s, f"{what} did not come about within {timeout_s} s"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


@dataclass(slots=True)
class Running:
    """A stream that is being read in the background."""

    stream: Stream
    task: asyncio.Task[None]

    async def tokens(self, count: int) -> None:
        """Wait until so many tokens have arrived."""
        await until(lambda: len(self.stream.token_ids) >= count or self.task.done(), f"{count} tokens")
        assert not self.stream.error, self.stream.error

    async def end(self) -> Stream:
        await asyncio.wait_for(self.task, WAIT_S)
        return self.stream

    def stall_after(self, at: float) -> float:
        """Seconds from `at` to the next token."""
        return next(arrival for arrival in self.stream.arrivals if arrival > at) - at


@dataclass(slots=True)
class Harness:
    """`check` is the one that decides what tokens are right."""

    cluster: TargetCluster
    client: Client
    size: Size
    oracle: GreedyOracle
    judge: Judge
    http: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.AsyncClient(base_url=self.cluster.url, timeout=60.0, limits=SHORT_LIVED)

    def start(self, job: Job) -> Running:
        stream = Stream(job, time.monotonic())
        return Running(stream, asyncio.create_task(self.client.fill(stream)))

    def start_many(self, count: int, prompt_length: int, max_tokens: int, seed: int = 0) -> list[Running]:
        """Every third one is sampled."""
        jobs = [job(prompt_length + n, max_tokens, seed + n, 0.9 if n % 3 == 2 else 0.0) for n in range(count)]
        return [self.start(one) for one in jobs]

    async def check(self, *running: Running) -> None:
        """Every stream ends well and is that of an undisturbed run; greedy ones are compared with transformers too."""
        result = Result(streams=[await one.end() for one in running])
        self.judge.judge(result, print)
        assert not result.lost, result.lost
        assert not result.wrong, result.wrong
        for stream in result.streams:
            if stream.job.temperature == 0:
                self.oracle.check(list(stream.job.prompt), stream.token_ids)

    async def record(self, running: Running) -> dict[str, Any]:
        """The router's record of a request that has begun to stream."""
        response = await self.http.get(f"/v1/requests/{running.stream.request_id}")
        record: dict[str, Any] = response.json()
        return record

    async def worker_of(self, running: Running, role: str) -> tuple[Worker, int]:
        """The worker that serves the running attempt, and its process. It may be given up for a while, as a stream that
        a machine in want of time has left silent is, and the attempt go on elsewhere.
        """
        deadline = time.monotonic() + WAIT_S
        while True:
            attempt = (await self.record(running))["attempts"][-1]
            worker_id = attempt["prefill_worker" if role == "prefill" else "worker"]
            for worker in await self.cluster.workers():
                if worker.worker_id == worker_id and worker.pid is not None:
                    return worker, worker.pid
            assert time.monotonic() < deadline, f"{worker_id} is not attached"
            await asyncio.sleep(0.05)

    async def attempts(self, running: Running) -> list[str]:
        """Outcomes of all attempts of a request."""
        return [attempt["outcome"] for attempt in (await self.record(running))["attempts"]]

    async def given_up(self, worker: Worker) -> float:
        """Wait until the router is no more attached to the worker; the time at which it is not."""
        deadline = time.monotonic() + WAIT_S
        while worker.worker_id in [other.worker_id for other in await self.cluster.workers()]:
            assert time.monotonic() < deadline, f"{worker.worker_id} was not given up within {WAIT_S} s"
            await asyncio.sleep(0.05)
        return time.monotonic()

    async def complete(self, *gone: Worker) -> float:
        """Wait until all workers are there and connected, without those that are gone; the seconds that it took."""
        seconds = await until_complete(self.cluster, self.size, COMPLETE_S, frozenset(w.worker_id for w in gone))
        assert seconds is not None, f"the cluster was not complete after {COMPLETE_S} s"
        return seconds

    async def trusted(self) -> None:
        """Send requests until no pair is under suspicion for what an earlier test did: those that rest get none, and
        one that failed last gets one at a time, so that others would not be handed over."""
        deadline = time.monotonic() + WAIT_S
        while suspects := [pair for pair in (await self._pairs()) if pair["failures"]]:
            assert time.monotonic() < deadline, f"not trusted again within {WAIT_S} s: {suspects}"
            if all(pair["resting_s"] for pair in suspects):
                await asyncio.sleep(min(pair["resting_s"] for pair in suspects))
            await self.check(*self.start_many(2 * self.size.prefill * self.size.decode, 20, 2))

    async def _pairs(self) -> list[dict[str, Any]]:
        pairs: list[dict[str, Any]] = (await self.http.get("/v1/workers")).json()["pairs"]
        return pairs

    async def at_rest(self, timeout_s: float) -> float:
        """Wait until no block and no slot is in use; the seconds that it took. Checks I4 at every look."""
        watch = BlockWatch(self.cluster)
        seconds, left = await until_at_rest(watch, timeout_s)
        assert not watch.violations, watch.violations
        assert left == 0, f"{left} blocks or slots still in use after {seconds:.1f} s: {await self.cluster.blocks()}"
        return seconds

    @asynccontextmanager
    async def injected(self, **settings: float) -> AsyncIterator[None]:
        """Inside, every worker's KV connections are disturbed."""
        await self.cluster.inject(FaultSettings.model_validate(settings))
        try:
            yield
        finally:
            await self.cluster.inject(FaultSettings())
