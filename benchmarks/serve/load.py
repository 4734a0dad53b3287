"""Puts a load on the server: an open loop that never waits for answers, or a closed loop of constant concurrency."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from baton.common.clock import Clock
from benchmarks.serve.arrivals import offered_rate
from benchmarks.serve.records import RequestRecord, Run

_DELAY_SAMPLE_S = 0.02


class Completer(Protocol):
    """Sends one request and fills its record; never raises for a failed one."""

    async def complete(self, record: RequestRecord, body: bytes) -> None: ...


@dataclass(frozen=True)
class Job:
    """A request that is ready to be sent: rendering it later would cost time while others are being measured."""

    record: RequestRecord
    body: bytes


async def open_loop(client: Completer, jobs: Sequence[Job], times: list[float], clock: Clock) -> float:
    """Send job i at `times[i]` seconds after the start, whatever became of the others. Returns the start."""
    async with asyncio.TaskGroup() as group:
        start = clock.now()
        for job, offset in zip(jobs, times, strict=True):
            job.record.scheduled = start + offset
            delay = job.record.scheduled - clock.now()
            if delay > 0:
                await asyncio.sleep(delay)
            group.create_task(client.complete(job.record, job.body))
    return start


async def closed_loop(client: Completer, jobs: Sequence[Job], concurrency: int, clock: Clock) -> float:
    """Keep `concurrency` requests under way until all are done. Returns the start."""
    start = clock.now()
    waiting = iter(jobs)
    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(jobs))):
            group.create_task(_drain(client, waiting))
    return start


async def measured_run(
    client: Completer, jobs: Sequence[Job], times: list[float] | None, concurrency: int | None, clock: Clock
) -> Run:
    """One run: open loop when `times` are given, otherwise closed loop. `connections` is left 0 for the caller."""
    delays: list[float] = []
    with _quiet_gc():
        cpu = time.process_time()
        async with _watch_loop(delays, clock):
            if times is not None:
                start = await open_loop(client, jobs, times, clock)
            else:
                start = await closed_loop(client, jobs, concurrency or 1, clock)
        cpu = time.process_time() - cpu
    records = [job.record for job in jobs]
    return Run(
        records=records,
        started=start,
        ended=max(record.ended for record in records),
        offered_rate=offered_rate(times) if times is not None else None,
        loop_delays=delays,
        cpu_seconds=cpu,
    )


async def _drain(client: Completer, waiting: Iterator[Job]) -> None:
    for job in waiting:
        await client.complete(job.record, job.body)


@contextmanager
def _quiet_gc() -> Iterator[None]:
    """Keep the collector from walking the prepared requests while time is measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@asynccontextmanager
async def _watch_loop(delays: list[float], clock: Clock) -> AsyncIterator[None]:
    """Sample how late the event loop runs a timer, as long as the block lasts."""
    watch = asyncio.get_running_loop().create_task(_sample_delays(delays, clock))
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.wait([watch])


async def _sample_delays(delays: list[float], clock: Clock) -> None:
    while True:
        due = clock.now() + _DELAY_SAMPLE_S
        await asyncio.sleep(_DELAY_SAMPLE_S)
        delays.append(max(0.0, clock.now() - due))
