"""One load on one running cluster, as `baton bench serve` would put it there, and what the server says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from baton.common.clock import Clock
from benchmarks.serve import metrics, options
from benchmarks.serve.client import ApiSettings
from benchmarks.serve.connection import parse_server
from benchmarks.serve.metrics import Slo
from benchmarks.serve.records import RequestRecord
from benchmarks.serve.report import to_json
from benchmarks.serve.session import BenchSettings, Session, choose_counting
from benchmarks.serve.tokens import TokenSource
from benchmarks.serve.workload import Workload, plan_workload
from benchmarks.served.plan import Load
from benchmarks.served.timelines import describe_timelines, fetch_timelines, fetch_workers

_QUANTILES = 101
_TIMEOUT_S = 120.0
_MAX_LAG_S = 0.05


@dataclasses.dataclass(frozen=True)
class Measured:
    """`row` is the result; `raw` has every request, for looking into it."""

    row: dict[str, Any]
    raw: dict[str, Any]


async def measure(
    url: str, model: str, vocab_size: int, load: Load, requests: int, clock: Clock, say: Callable[[str], None]
) -> Measured:
    """Raises Unavailable when the server answers no plain request."""
    server = parse_server(url)
    workload = _workload(load, requests, vocab_size)
    api = ApiSettings(model, timeout=_TIMEOUT_S)
    source = TokenSource(1, workload.settings.token_low, workload.settings.token_high)
    counting, tried = await choose_counting(server, api, source, clock, None)
    settings = BenchSettings(
        server=server,
        api=dataclasses.replace(api, counting=counting),
        rate=load.rate,
        concurrency=load.concurrency,
        warmup=load.warmup,
        repeat=1,
        slo=Slo(None, None, 0.9),
        search=None,
        max_lag=_MAX_LAG_S,
    )
    result = await Session(settings, workload, clock, None, say).execute()
    records = result.runs[0].run.records
    timelines = await fetch_timelines(url, (r.request_id for r in records if r.request_id is not None))
    document = to_json(result, {}, {"asked": counting, "tried": tried}, records=True)
    row = {
        "load": load.model_dump(),
        "requests": requests,
        "invalid": result.invalid,
        "failures": metrics.failures(records),
        "summary": result.runs[0].summary,
        "server": describe_timelines(timelines),
        "workers": await fetch_workers(url),
        "quantiles_ms": _quantiles(records),
    }
    return Measured(row, {"bench": document, "timelines": timelines})


def _workload(load: Load, requests: int, vocab_size: int) -> Workload:
    settings = options.workload_settings(
        name=None,
        input_len=load.input,
        output_len=load.output,
        trace=None,
        time_scale=1.0,
        count=requests,
        max_total_tokens=None,
        seed=load.seed,
        token_ids=options.token_range(None, vocab_size),
    )
    return plan_workload(settings)


def _quantiles(records: list[RequestRecord]) -> dict[str, list[float]]:
    """Minimum, every percent and maximum of each latency, in milliseconds: enough to draw its distribution."""
    good = [record for record in records if record.ok]
    gaps = [metrics.inter_token_latencies(record) for record in good]
    samples = {
        "ttft": [metrics.ttft(record) for record in good],
        "second_token": [metrics.second_token(record) for record in good],
        "tpot": [metrics.tpot(record) for record in good],
        "itl": np.concatenate(gaps).tolist() if gaps else [],
    }
    shares = np.linspace(0.0, 100.0, _QUANTILES)
    known = {name: [value for value in values if value is not None] for name, values in samples.items()}
    return {
        name: [round(1e3 * float(value), 3) for value in np.percentile(values, shares)]
        for name, values in known.items()
        if values
    }
