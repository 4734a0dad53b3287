"""Doing it: each fault of a plan, at its times, against a running cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import assert_never

import httpx

from baton.chaos import processes
from baton.chaos.cluster import Size, TargetCluster, Worker
from baton.chaos.load import Client, ComeAgain, Jobs, StreamBroken
from baton.chaos.plan import Aborts, Fault, Inject, Kill, KillProcess, Pause, WorkerRole, label
from baton.chaos.watch import until_complete
from baton.common.config import FaultSettings
from baton.common.errors import BatonError

MAX_PAUSE_BEFORE_DISCONNECT_S = 0.5
_WORKER_WAIT_S = 60.0
_TITLES = {"kill_gcs": "gcs_server", "kill_controller": "ray::ClusterController"}


@dataclass(slots=True)
class Injection:
    """One fault that was done, from `at` to `until` (`time.monotonic`, the same for one that takes no time).

    `whole_after_s`: seconds from its end until the cluster was complete again; None: it was not, within the limit or
    before the end of the run.
    """

    label: str
    at: float
    until: float
    whole_after_s: float | None = None


@dataclass(slots=True)
class FaultSeries:
    """Does the faults of a plan. `done` grows as they are done; `jobs` are those of clients that disconnect."""

    cluster: TargetCluster
    size: Size
    client: Client
    jobs: Jobs
    rng: random.Random
    recover_s: float
    done: list[Injection] = field(default_factory=list)
    _watches: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, fault: Fault, start: float) -> None:
        """All times of one fault; ends after the last one, or never. One that was late does not hurry the next."""
        number, due = 0, start + fault.at_s
        while fault.count is None or number < fault.count:
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            await self._do(fault)
            last_at = max(injection.at for injection in self.done if injection.label == label(fault))
            number, due = number + 1, max(due, last_at) + fault.every_s

    async def _do(self, fault: Fault) -> None:
        match fault:
            case Kill(role=role):
                await self._kill(await self._random_worker(role), label(fault))
            case Pause(role=role, for_s=for_s):
                await self._pause(await self._random_worker(role), label(fault), for_s)
            case Aborts(clients=clients):
                async with self._injected(label(fault)):
                    await self._disconnect_many(clients)
            case Inject(settings=settings, for_s=for_s):
                async with self._injected(label(fault)):
                    await self.cluster.inject(settings)
                    await asyncio.sleep(for_s)
                    await self.cluster.inject(FaultSettings())
            case KillProcess(kind=kind):
                async with self._injected(label(fault)):
                    self._kill_process(_TITLES[kind])
            case _:
                assert_never(fault)

    async def recovered(self) -> None:
        """Returns once it is known of every fault how long the cluster took to be whole again."""
        await asyncio.gather(*self._watches)

    @contextlib.asynccontextmanager
    async def _injected(self, name: str, gone: Worker | None = None) -> AsyncIterator[None]:
        """Note a fault before it is done. What follows it is watched while other faults go on."""
        injection = Injection(name, time.monotonic(), time.monotonic())
        self.done.append(injection)
        yield
        injection.until = time.monotonic()
        watch = asyncio.create_task(self._watch(injection, frozenset({gone.worker_id} if gone else ())))
        self._watches.add(watch)

    async def _watch(self, injection: Injection, gone: frozenset[str]) -> None:
        injection.whole_after_s = await until_complete(self.cluster, self.size, self.recover_s, gone)

    async def _random_worker(self, role: WorkerRole) -> tuple[Worker, int]:
        """Waits for one if none is up. Raises BatonError when none comes."""
        deadline = time.monotonic() + _WORKER_WAIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                workers = [worker for worker in await self.cluster.workers() if role in ("any", worker.role)]
                if workers:
                    worker = self.rng.choice(sorted(workers, key=lambda one: one.worker_id))
                    if (pid := worker.pid) is not None:
                        return worker, pid
            await asyncio.sleep(0.1)
        raise BatonError(f"no {role} worker of this machine came up within {_WORKER_WAIT_S:g} s")

    async def _kill(self, victim: tuple[Worker, int], name: str) -> None:
        worker, pid = victim
        async with self._injected(name, gone=worker):
            _signal(pid, signal.SIGKILL)

    async def _pause(self, victim: tuple[Worker, int], name: str, for_s: float) -> None:
        _, pid = victim
        async with self._injected(name):
            _signal(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(for_s)
            finally:
                _signal(pid, signal.SIGCONT)

    def _kill_process(self, name: str) -> None:
        pids = [pid for pid in self.cluster.processes() if name in processes.title(pid)]
        if not pids:
            raise BatonError(f"no process {name} belongs to this cluster")
        for pid in pids:
            _signal(pid, signal.SIGKILL)

    async def _disconnect_many(self, count: int) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(count):
                clients.create_task(self._disconnect())

    async def _disconnect(self) -> None:
        """Send a request and hang up: before the first token, or after some tokens, or as good as at the end."""
        job = self.jobs.next()
        num_chunks = self.rng.choice((0, 1, self.rng.randint(1, job.max_tokens)))
        patience_s = self.rng.uniform(0.0, MAX_PAUSE_BEFORE_DISCONNECT_S) if num_chunks == 0 else None
        with contextlib.suppress(TimeoutError, StreamBroken, ComeAgain, httpx.HTTPError):
            async with asyncio.timeout(patience_s), contextlib.aclosing(self.client.chunks(job)) as chunks:
                seen = 0
                async for _ in chunks:
                    seen += 1
                    if num_chunks and seen >= num_chunks:
                        return


def _signal(pid: int, number: signal.Signals) -> None:
    """A process that has ended by itself meanwhile needs none."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
