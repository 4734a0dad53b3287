"""The definitions of every measure, against independent arithmetic."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serve import metrics
from benchmarks.serve.metrics import Slo
from benchmarks.serve.records import RequestRecord, Run

gap = st.integers(0, 10_000).map(lambda milliseconds: milliseconds / 1000)


def answered(
    first: float = 0.1, gaps: tuple[float, ...] = (), tokens: tuple[int, ...] = (), start: float = 5.0, **more: object
) -> RequestRecord:
    """Started at `start`; chunks of `tokens` (all 1 if left out), the first after `first`, then `gaps` apart."""
    times = [start + first]
    for step in gaps:
        times.append(times[-1] + step)
    counts = list(tokens) or [1] * len(times)
    record = RequestRecord(0, 10, sum(counts), started=start, ended=times[-1] + 0.5, chunk_times=times)
    record.chunk_tokens, record.output_tokens = counts, sum(counts)
    for name, value in more.items():
        setattr(record, name, value)
    return record


def failed(kind: str = "disconnected") -> RequestRecord:
    return RequestRecord(1, 10, 5, started=5.0, ended=6.0, chunk_times=[5.1], chunk_tokens=[1], failure=kind)


def run_of(*records: RequestRecord, duration: float = 10.0) -> Run:
    return Run(list(records), 5.0, 5.0 + duration, 2.0, [0.001, 0.003], 1.0)


def ranked(values: list[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, written out."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@given(st.lists(gap, min_size=1, max_size=60))
def test_percentiles_are_linear_between_ranks_in_milliseconds(values: list[float]) -> None:
    summary = metrics.describe("x", values)
    for percent in metrics.PERCENTILES:
        assert summary[f"x_ms_p{percent}"] == pytest.approx(ranked(values, percent) * 1000)
    assert summary["x_ms_mean"] == pytest.approx(sum(values) / len(values) * 1000)
    assert summary["x_ms_max"] == pytest.approx(max(values) * 1000)


@given(gap, st.lists(gap, min_size=1, max_size=30))
def test_one_token_a_chunk(first: float, gaps: list[float]) -> None:
    record = answered(first, tuple(gaps))
    assert metrics.ttft(record) == pytest.approx(first)
    assert metrics.second_token(record) == pytest.approx(gaps[0])
    assert metrics.tpot(record) == pytest.approx(sum(gaps) / len(gaps))
    assert metrics.inter_token_latencies(record) == pytest.approx(gaps, abs=1e-9)


@given(st.lists(st.tuples(gap, st.integers(1, 4)), min_size=1, max_size=20))
def test_tokens_of_one_chunk_are_no_time_apart(chunks: list[tuple[float, int]]) -> None:
    record = answered(0.1, tuple(step for step, _ in chunks[1:]), tuple(count for _, count in chunks))
    total = sum(count for _, count in chunks)
    latencies = metrics.inter_token_latencies(record)
    assert len(latencies) == total - 1
    assert sum(latency > 0 for latency in latencies) == sum(step > 0 for step, _ in chunks[1:])
    per_token = metrics.tpot(record)
    assert (per_token is None) == (total == 1)
    if per_token is not None:
        assert per_token * (total - 1) == pytest.approx(sum(latencies), abs=1e-9)


def test_tpot_uses_the_servers_count_and_itl_what_arrived() -> None:
    record = answered(0.1, (0.2, 0.2), output_tokens=5)
    assert metrics.tpot(record) == pytest.approx(0.4 / 4)
    assert len(metrics.inter_token_latencies(record)) == 2
    assert metrics.summarize(run_of(record), Slo(None, None))["uncounted_tokens"] == 2


def test_a_single_token_has_ttft_only() -> None:
    summary = metrics.latencies([answered(0.25)])
    assert summary["ttft_ms_p50"] == pytest.approx(250)
    assert [summary[f"{name}_ms_p50"] for name in ("tpot", "itl", "second_token")] == [None] * 3


@pytest.mark.parametrize(
    ("record", "slo", "expected"),
    [
        (answered(0.1, (0.01,)), Slo(0.1001, 0.0101), True),
        (answered(0.2, (0.01,)), Slo(0.1, 0.02), False),
        (answered(0.1, (0.03,)), Slo(0.2, 0.02), False),
        (answered(0.1, (0.03,)), Slo(0.2, None), True),
        (answered(0.1), Slo(None, 0.001), True),
        (failed(), Slo(9.0, 9.0), False),
    ],
)
def test_both_slos_must_be_met_and_a_failure_meets_none(record: RequestRecord, slo: Slo, expected: bool) -> None:
    assert metrics.meets(record, slo) is expected


def test_failures_count_against_goodput_but_not_in_latencies() -> None:
    records = [answered(0.1, (0.01,)), answered(0.5, (0.01,)), failed(), failed("http_503")]
    summary = metrics.summarize(run_of(*records), Slo(0.2, None))
    assert (summary["requests"], summary["failed"]) == (4, 2)
    assert summary["in_slo_share"] == pytest.approx(1 / 4)
    assert summary["in_slo_rps"] == pytest.approx(1 / 10)
    assert summary["carried_rps"] == pytest.approx(2 / 10)
    assert summary["output_tps"] == pytest.approx(4 / 10)
    assert summary["ttft_ms_max"] == pytest.approx(500)
    assert metrics.failures(records) == {"disconnected": 1, "http_503": 1}


def test_client_lag_is_the_delay_of_sending() -> None:
    summary = metrics.summarize(run_of(answered(scheduled=4.75), answered(scheduled=5.0)), Slo(None, None))
    assert summary["client_lag_ms_max"] == pytest.approx(250)
    assert summary["client_lag_ms_mean"] == pytest.approx(125)
    assert summary["loop_delay_ms_max"] == pytest.approx(3)
    assert summary["in_slo_share"] is None


def test_a_run_in_which_all_fails_still_has_a_summary() -> None:
    summary = metrics.summarize(run_of(failed()), Slo(1.0, 1.0))
    assert summary["ttft_ms_p50"] is None
    assert summary["in_slo_share"] == 0.0
    assert summary["carried_rps"] == 0.0


def test_paths_are_kept_apart() -> None:
    records = [answered(0.1, path="local"), answered(0.3, path="remote"), answered(0.5, path="remote"), answered(0.9)]
    groups = metrics.by_path(records)
    assert [groups[path]["requests"] for path in ("local", "remote")] == [1, 2]
    assert groups["remote"]["ttft_ms_mean"] == pytest.approx(400)


def test_repeats_combine_to_medians_and_leave_out_what_one_run_lacks() -> None:
    combined = metrics.combine([{"a": 1.0, "b": 2.0}, {"a": 5.0, "b": None}, {"a": 2.0, "b": 2.0}])
    assert combined == {"a": {"median": 2.0, "min": 1.0, "max": 5.0}, "b": None}
