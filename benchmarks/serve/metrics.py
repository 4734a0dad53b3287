"""What is measured, per request and over a run. Pure; times in seconds in, milliseconds out of summaries.

TTFT       start of the request to its first token
second     first token to second token: where a hand-over between workers would show
TPOT       one number per request: (last - first) / (n - 1); none for answers of one token
ITL        one number per token after the first: gap to the token before it; tokens of one chunk are 0 apart
chunk gap  gap between chunks that carry tokens
E2E        start of the request to the end of its stream
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.serve.records import RequestRecord, Run

Samples = NDArray[np.float64]
PERCENTILES = (50, 90, 95, 99)
Summary = dict[str, float | None]
"""Flat, so that runs are compared and combined key by key; None where there is nothing to measure."""


@dataclass(frozen=True)
class Slo:
    """Seconds; None is no bound. `share` of the requests must meet both."""

    ttft: float | None
    tpot: float | None
    share: float = 0.9

    @property
    def given(self) -> bool:
        return self.ttft is not None or self.tpot is not None


def token_times(record: RequestRecord) -> Samples:
    """[tokens that arrived]: when each token arrived."""
    return np.repeat(np.asarray(record.chunk_times, dtype=np.float64), record.chunk_tokens)


def ttft(record: RequestRecord) -> float | None:
    return record.chunk_times[0] - record.started if record.chunk_times else None


def second_token(record: RequestRecord) -> float | None:
    times = token_times(record)
    return float(times[1] - times[0]) if len(times) > 1 else None


def tpot(record: RequestRecord) -> float | None:
    """Over the tokens that the server counted, even if some of them arrived in no chunk of their own."""
    if record.output_tokens < 2:
        return None
    return (record.chunk_times[-1] - record.chunk_times[0]) / (record.output_tokens - 1)


def inter_token_latencies(record: RequestRecord) -> Samples:
    """[tokens that arrived - 1]"""
    return np.diff(token_times(record))


def meets(record: RequestRecord, slo: Slo) -> bool:
    """A failed request meets no SLO; an answer of one token has no TPOT to miss."""
    first, per_token = ttft(record), tpot(record)
    if not record.ok or first is None:
        return False
    return (slo.ttft is None or first <= slo.ttft) and (slo.tpot is None or per_token is None or per_token <= slo.tpot)


def describe(name: str, samples: Sequence[float] | Samples) -> Summary:
    """Mean, percentiles (linear interpolation) and maximum in milliseconds."""
    values = np.asarray(samples, dtype=np.float64) * 1000.0
    if not values.size:
        return {f"{name}_ms_{stat}": None for stat in ("mean", *(f"p{p}" for p in PERCENTILES), "max")}
    ranks = np.percentile(values, PERCENTILES)
    points = {f"{name}_ms_p{p}": float(rank) for p, rank in zip(PERCENTILES, ranks, strict=True)}
    return {f"{name}_ms_mean": float(values.mean()), **points, f"{name}_ms_max": float(values.max())}


def latencies(records: Iterable[RequestRecord]) -> Summary:
    """All latency statistics of the requests that succeeded."""
    good = [record for record in records if record.ok]
    gaps = [inter_token_latencies(record) for record in good]
    chunks = [np.diff(np.asarray(record.chunk_times)) for record in good]
    return {
        **describe("ttft", _present(ttft(record) for record in good)),
        **describe("second_token", _present(second_token(record) for record in good)),
        **describe("tpot", _present(tpot(record) for record in good)),
        **describe("itl", np.concatenate(gaps) if gaps else []),
        **describe("chunk_gap", np.concatenate(chunks) if chunks else []),
        **describe("e2e", [record.ended - record.started for record in good]),
    }


def summarize(run: Run, slo: Slo) -> Summary:
    """Everything about one run. Rates are over the time from the start of the run to the end of its last request."""
    records = run.records
    good = [record for record in records if record.ok]
    duration = run.ended - run.started
    in_slo = sum(meets(record, slo) for record in records)
    chunks = sum(len(record.chunk_tokens) for record in good)
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "duration_s": duration,
        "offered_rps": run.offered_rate,
        "carried_rps": _ratio(len(good), duration),
        "input_tokens": sum(record.input_length for record in good),
        "output_tokens": sum(record.output_tokens for record in good),
        "output_tps": _ratio(sum(record.output_tokens for record in good), duration),
        "total_tps": _ratio(sum(record.input_length + record.output_tokens for record in good), duration),
        "tokens_per_chunk": _ratio(sum(sum(record.chunk_tokens) for record in good), chunks),
        "uncounted_tokens": sum(record.output_tokens - sum(record.chunk_tokens) for record in good),
        "cut_short": sum(record.output_tokens < record.max_tokens for record in good),
        "cached_share": _cached_share(good),
        "in_slo_share": _ratio(in_slo, len(records)) if slo.given else None,
        "in_slo_rps": _ratio(in_slo, duration) if slo.given else None,
        **latencies(records),
        **describe("client_lag", client_lags(run)),
        **describe("loop_delay", run.loop_delays),
        "client_cpu_share": _ratio(run.cpu_seconds, duration),
        "connections": run.connections,
    }


def client_lags(run: Run) -> list[float]:
    """How late each request of an open loop was sent; empty for a closed loop."""
    return [record.started - record.scheduled for record in run.records if record.scheduled is not None]


def failures(records: Iterable[RequestRecord]) -> dict[str, int]:
    """Number of failed requests by kind, the most frequent first."""
    return dict(Counter(record.failure for record in records if record.failure is not None).most_common())


def by_path(records: Sequence[RequestRecord]) -> dict[str, Summary]:
    """Latencies for each path that the server named; empty when it names none."""
    paths = sorted({record.path for record in records if record.path is not None})
    groups = {path: [record for record in records if record.path == path] for path in paths}
    return {path: {"requests": len(group), **latencies(group)} for path, group in groups.items()}


def combine(summaries: Sequence[Summary]) -> dict[str, dict[str, float] | None]:
    """Median, minimum and maximum over runs, for every key that all of them measured."""
    combined: dict[str, dict[str, float] | None] = {}
    for key in summaries[0]:
        values = _present(summary.get(key) for summary in summaries)
        complete = len(values) == len(summaries)
        combined[key] = _spread(values) if complete else None
    return combined


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def _cached_share(records: list[RequestRecord]) -> float | None:
    known = [record for record in records if record.cached_tokens is not None]
    return _ratio(sum(record.cached_tokens or 0 for record in known), sum(record.input_length for record in known))


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _ratio(amount: float, whole: float) -> float | None:
    return amount / whole if whole > 0 else None
