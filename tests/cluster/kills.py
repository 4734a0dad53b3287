"""Kills one worker after the other beside two that stay, under load through the real router, and measures the damage.

One prefill and one decode worker stay for the whole run; each victim joins them, dies where it is meant to, and is
taken from the members, as a supervisor would. No Ray: its restarts would take most of the time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import httpx

from baton.chaos.cluster import TargetCluster
from baton.chaos.load import Client, Job, Stream
from baton.chaos.watch import BlockWatch, until_at_rest
from baton.common.config import BatonConfig, FaultSettings
from router.registry import Member
from router.server import Router
from tests.cluster.deaths import NEVER
from tests.cluster.kill_worker import KillWorker

STEADY, BURST = 3, 8
DEATH_S, END_S, REST_S = 40.0, 60.0, 8.0
GPU_OF = {"prefill": 0, "decode": 1}


@dataclass(frozen=True)
class Victim:
    role: str
    death: str


@dataclass
class Outcome:
    """Of one kill. `stall_s`: the longest wait for a next token of a stream that had to move, None if none had to.

    `other_stall_s`: the same of the others. `fresh_s`: a new request, from the kill to its last token, over both
    survivors. `rest_s`: until no block and no slot was in use.
    """

    victim: Victim
    stall_s: float | None
    other_stall_s: float
    fresh_s: float
    rest_s: float
    num_moved: int


@dataclass
class KillRun:
    """The survivors, the router and all that clients saw. `moved`: streams that were resubmitted."""

    config: BatonConfig
    router: Router
    prefill: KillWorker
    decode: KillWorker
    victims: list[KillWorker]
    client: Client
    cluster: TargetCluster
    http: httpx.AsyncClient
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    streams: list[Stream] = field(default_factory=list)
    moved: list[Stream] = field(default_factory=list)

    async def warm_up(self) -> None:
        """As much load as a kill sees, so that memory taken from now on is a leak."""
        await asyncio.wait_for(self.router.registry.wait_for(1, 1), END_S)
        await self._all([self._start() for _ in range(STEADY + 2 * BURST)])
        assert await self._path(self.streams[-1]) == "remote"
        await self.rest()

    async def memory(self) -> tuple[int, int]:
        return await self.prefill.memory(), await self.decode.memory()

    async def kill(self, worker: KillWorker) -> Outcome:
        victim = Victim(worker.role, worker.death)
        steady = [asyncio.create_task(self._steady()) for _ in range(STEADY)]
        self._set_members(worker)
        dying = asyncio.create_task(worker.died(DEATH_S))
        burst: list[tuple[Stream, asyncio.Task[None]]] = []
        while not dying.done():
            burst += [self._start() for _ in range(BURST)] if self._open(burst) < BURST else []
            await asyncio.wait([dying], timeout=0.1)
        await dying
        self._set_members()
        fresh = self._start()
        await self._all([fresh])
        fresh_s = fresh[0].ended_at - worker.died_at
        for task in steady:
            task.cancel()
        await asyncio.gather(*steady)
        await self._all(burst)
        rest_s = await self.rest()
        return await self._outcome(victim, worker.died_at, fresh_s, rest_s)

    async def again(self, stream: Stream) -> Stream:
        """The same request with nobody dying."""
        return await self.client.run(stream.job)

    async def rest(self) -> float:
        watch = BlockWatch(self.cluster)
        seconds, left = await until_at_rest(watch, REST_S)
        assert not watch.violations, watch.violations
        assert left == 0, f"{left} blocks or slots in use after {seconds:.1f} s: {await self.cluster.blocks()}"
        return seconds

    def _set_members(self, *more: KillWorker) -> None:
        workers = (self.prefill, self.decode, *more)
        self.router.registry.set_members([Member(worker.address, worker.role) for worker in workers])

    def _start(self) -> tuple[Stream, asyncio.Task[None]]:
        """Every third one is sampled."""
        number = len(self.streams)
        prompt = tuple(self.rng.choices(range(256), k=self.rng.randint(100, 220)))
        stream = Stream(Job(prompt, 40, 0.9 if number % 3 == 2 else 0.0, number), time.monotonic())
        self.streams.append(stream)
        return stream, asyncio.create_task(self.client.fill(stream))

    async def _steady(self) -> None:
        """One request after the other until cancelled; the last one still ends."""
        going = True
        while going:
            _, task = self._start()
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                going = False
                await task

    @staticmethod
    def _open(burst: Sequence[tuple[Stream, asyncio.Task[None]]]) -> int:
        return sum(not task.done() for _, task in burst)

    @staticmethod
    async def _all(started: Sequence[tuple[Stream, asyncio.Task[None]]]) -> None:
        await asyncio.wait_for(asyncio.gather(*(task for _, task in started)), END_S)

    async def _outcome(self, victim: Victim, died_at: float, fresh_s: float, rest_s: float) -> Outcome:
        stalls: dict[bool, list[float]] = {True: [], False: []}
        for stream in self.streams:
            if stream.started_at <= died_at < stream.ended_at:
                has_moved = await self._attempts(stream) > 1
                if has_moved:
                    self.moved.append(stream)
                stalls[has_moved].append(next((at for at in stream.arrivals if at > died_at), died_at) - died_at)
        return Outcome(
            victim=victim,
            stall_s=max(stalls[True], default=None),
            other_stall_s=max(stalls[False], default=0.0),
            fresh_s=fresh_s,
            rest_s=rest_s,
            num_moved=len(stalls[True]),
        )

    async def _attempts(self, stream: Stream) -> int:
        return len((await self.http.get(f"/v1/requests/{stream.request_id}")).json()["attempts"])

    async def _path(self, stream: Stream) -> str:
        return str((await self.http.get(f"/v1/requests/{stream.request_id}")).json()["path"])


@asynccontextmanager
async def kill_run(config: BatonConfig, gpus: Sequence[str], victims: Sequence[Victim]) -> AsyncIterator[KillRun]:
    """Survivors up and attached, victims waiting for their `serve`. Without GPUs all run on the CPU."""
    async with AsyncExitStack() as stack:
        roles = [Victim("prefill", NEVER), Victim("decode", NEVER), *victims]
        prefill, decode, *others = await asyncio.gather(*(_start(role, config, gpus, stack) for role in roles))
        await asyncio.gather(prefill.serve(), decode.serve())
        router = Router(config)
        await router.start()
        stack.push_async_callback(router.stop)
        url = f"http://127.0.0.1:{router.http_port}"
        cluster = TargetCluster(url, "", _cannot_inject)
        client, http = Client(url, config.model_name, END_S), httpx.AsyncClient(base_url=url, timeout=20.0)
        for closable in (client.close, cluster.close, http.aclose):
            stack.push_async_callback(closable)
        run = KillRun(config, router, prefill, decode, others, client, cluster, http)
        run._set_members()
        yield run


async def _start(victim: Victim, config: BatonConfig, gpus: Sequence[str], stack: AsyncExitStack) -> KillWorker:
    """Prefill workers on the first GPU, decode workers on the second if there is one."""
    gpu = gpus[GPU_OF[victim.role] % len(gpus)] if gpus else None
    worker = await KillWorker.start(victim.role, config, victim.death, gpu)
    stack.push_async_callback(worker.kill)
    return worker


async def _cannot_inject(settings: FaultSettings) -> None:
    raise NotImplementedError(f"victims kill themselves: {settings}")
