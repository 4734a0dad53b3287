"""Runs a whole benchmark: probes the server, warms it up, repeats the measured run or searches the goodput."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from baton.common.clock import Clock
from baton.common.errors import Unavailable
from benchmarks.serve.arrivals import arrival_times
from benchmarks.serve.client import ApiSettings, CompletionClient, render_body
from benchmarks.serve.connection import ConnectionPool, Server
from benchmarks.serve.goodput import Probe, Search, search_goodput
from benchmarks.serve.load import Job, measured_run
from benchmarks.serve.metrics import Slo, Summary, client_lags, summarize
from benchmarks.serve.records import Counting, RequestRecord, Run
from benchmarks.serve.tokens import Domain, TokenSource
from benchmarks.serve.workload import Workload

_WARMUP_CONCURRENCY = 8
_WARMUP_RUN = -1
_PROBE_TOKENS = 4
_COUNT_TOLERANCE = 0.01
_OFFERED = "offered"


@dataclass(frozen=True)
class SearchSettings:
    """Bounds in requests per second; the interval is narrowed to `tolerance` of its upper end."""

    low: float
    high: float
    tolerance: float = 0.05


@dataclass(frozen=True)
class BenchSettings:
    """Everything that decides what is measured. `rate` and `concurrency` None: a trace's own times."""

    server: Server
    api: ApiSettings
    rate: float | None
    concurrency: int | None
    warmup: int
    repeat: int
    slo: Slo
    search: SearchSettings | None
    max_lag: float
    """Seconds: a run whose client was later than this at p99 is invalid."""
    label: str | None = None


@dataclass(frozen=True)
class MeasuredRun:
    """A run, its summary, and why it must not be used (empty: it may)."""

    run: Run
    summary: Summary
    invalid: list[str]


@dataclass(frozen=True)
class BenchResult:
    """What a session hands to the report."""

    settings: BenchSettings
    workload: Workload
    runs: list[MeasuredRun]
    search: Search | None
    counted_by: set[Counting]

    @property
    def invalid(self) -> list[str]:
        return [f"run {number}: {reason}" for number, run in enumerate(self.runs, 1) for reason in run.invalid]


class Session:
    """One benchmark against one server. Used from the event loop's thread; `say` gets one line per stage."""

    def __init__(
        self, settings: BenchSettings, workload: Workload, clock: Clock, api_key: str | None, say: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._workload = workload
        self._clock = clock
        self._api_key = api_key
        self._say = say
        self._runs_made = 0
        self._counted_by: set[Counting] = set()

    async def execute(self) -> BenchResult:
        """All of it. Raises Unavailable when the server answers no plain request."""
        await self._warm_up()
        search: Search | None = None
        if self._settings.search is not None:
            search, runs = await self._search(self._settings.search)
        else:
            runs = await self._repeat(self._settings.rate)
        return BenchResult(self._settings, self._workload, runs, search, self._counted_by)

    async def _repeat(self, rate: float | None) -> list[MeasuredRun]:
        return [await self._measure(rate, repeat) for repeat in range(self._settings.repeat)]

    async def _search(self, bounds: SearchSettings) -> tuple[Search, list[MeasuredRun]]:
        """The search, and the runs of the highest rate that passed (of the lowest rate if none did)."""
        runs: dict[float, list[MeasuredRun]] = {}

        async def probe(rate: float) -> Probe:
            runs[rate] = await self._repeat(rate)
            share = float(np.median([measured.summary["in_slo_share"] or 0.0 for measured in runs[rate]]))
            self._say(f"  {rate:.3g} req/s: {share:.1%} in SLO")
            return Probe(rate, share, valid=not any(measured.invalid for measured in runs[rate]))

        search = await search_goodput(probe, bounds.low, bounds.high, self._settings.slo.share, bounds.tolerance)
        return search, runs[bounds.low if search.passed is None else search.passed]

    async def _measure(self, rate: float | None, repeat: int) -> MeasuredRun:
        settings = self._settings
        self._runs_made += 1
        jobs = self._jobs(self._runs_made)
        times = None if settings.concurrency is not None else arrival_times(self._workload, rate, repeat)
        run = await self._send(jobs, times, settings.concurrency)
        invalid = [*invalid_reasons(run, settings.max_lag), *miscounted(run, settings.api.counting)]
        self._say(f"run {self._runs_made}: {len(jobs)} requests in {run.ended - run.started:.1f} s")
        return MeasuredRun(run, summarize(run, settings.slo), invalid)

    async def _warm_up(self) -> None:
        """Requests of the same lengths and other tokens; they are in no result, but must succeed."""
        jobs = self._jobs(_WARMUP_RUN, self._settings.warmup)
        if not jobs:
            return
        run = await self._send(jobs, None, self._settings.concurrency or _WARMUP_CONCURRENCY)
        failed = [record for record in run.records if not record.ok]
        self._say(f"warm-up: {len(jobs)} requests in {run.ended - run.started:.1f} s")
        if len(failed) == len(jobs):
            raise Unavailable(f"no warm-up request succeeded; the first: {failed[0].failure}: {failed[0].message}")

    async def _send(self, jobs: list[Job], times: list[float] | None, concurrency: int | None) -> Run:
        pool = ConnectionPool(self._settings.server, self._clock)
        client = CompletionClient(self._settings.server, pool, self._settings.api, self._clock, self._api_key)
        try:
            run = await measured_run(client, jobs, times, concurrency, self._clock)
        finally:
            pool.close()
        self._counted_by |= client.counted_by
        return dataclasses.replace(run, connections=pool.opened)

    def _jobs(self, run: int, limit: int | None = None) -> list[Job]:
        prompts = self._workload.prompts(run, limit)
        return [
            Job(
                RequestRecord(index, planned.input_length, planned.output_length),
                render_body(self._settings.api, prompt, planned.output_length),
            )
            for index, (planned, prompt) in enumerate(zip(self._workload.requests[:limit], prompts, strict=True))
        ]


def invalid_reasons(run: Run, max_lag: float) -> list[str]:
    """Why a run says more about the client than about the server. Requests sent all at once are late by nature of
    the client, so they are held to the same bound."""
    checks = {"requests were sent late": client_lags(run), "the client's event loop was late": run.loop_delays}
    late = {what: float(np.percentile(values, 99)) for what, values in checks.items() if values}
    return [
        f"{what}: p99 {value * 1000:.1f} ms, bound {max_lag * 1000:g} ms"
        for what, value in late.items()
        if value > max_lag
    ]


def miscounted(run: Run, counting: Counting) -> list[str]:
    """A server whose counts per chunk do not add up to its usage gives wrong ITL and TPOT. With one token a chunk the
    difference is expected, and reported as `uncounted_tokens`."""
    total = sum(record.output_tokens for record in run.records if record.ok)
    counted = sum(sum(record.chunk_tokens) for record in run.records if record.ok)
    if counting is Counting.CHUNKS or abs(total - counted) <= _COUNT_TOLERANCE * total:
        return []
    return [f"the server's {counting} of the chunks adds up to {counted} tokens, its usage says {total}"]


async def choose_counting(
    server: Server, api: ApiSettings, source: TokenSource, clock: Clock, api_key: str | None
) -> tuple[Counting, dict[str, Any]]:
    """The most exact way of counting tokens that the server takes and really offers, and what each try gave.

    Raises Unavailable when not even a plain request succeeds.
    """
    tried: dict[str, Any] = {}
    prompt = source.draw(Domain.PROMPT, 0, _PROBE_TOKENS)
    for counting in (Counting.USAGE, Counting.TOKEN_IDS, Counting.CHUNKS):
        asked = dataclasses.replace(api, counting=counting)
        pool = ConnectionPool(server, clock)
        client = CompletionClient(server, pool, asked, clock, api_key)
        record = RequestRecord(0, len(prompt), _PROBE_TOKENS)
        await client.complete(record, render_body(asked, prompt, _PROBE_TOKENS))
        pool.close()
        tried[counting] = _outcome(record, counting, client.counted_by)
        if tried[counting] == _OFFERED:
            return counting, tried
    raise Unavailable(f"{server.url} does not serve a plain streamed completion: {tried[Counting.CHUNKS]}")


def _outcome(record: RequestRecord, counting: Counting, counted_by: set[Counting]) -> str:
    if not record.ok:
        return f"{record.failure}: {record.message}"
    if counted_by != {counting}:
        return "ignored"
    counted = sum(record.chunk_tokens)
    if counting is not Counting.CHUNKS and counted != record.output_tokens:
        return f"wrong: {counted} tokens by chunk, {record.output_tokens} by the last usage"
    return _OFFERED
