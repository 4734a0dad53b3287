"""Arrival processes and the goodput search."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.common.errors import ConfigError
from benchmarks.serve.arrivals import arrival_times, offered_rate, poisson_times
from benchmarks.serve.goodput import Probe, search_goodput
from tests.unit.benchmarks.test_workload import planned


def test_poisson_gaps_have_the_mean_and_spread_of_an_exponential() -> None:
    gaps = np.diff(poisson_times(20_001, 8.0, "seed"))
    assert abs(gaps.mean() * 8.0 - 1.0) < 0.03
    assert abs(gaps.std() * 8.0 - 1.0) < 0.03
    assert abs(np.mean(gaps > 1 / 8.0) - math.exp(-1)) < 0.01


@given(st.integers(2, 50), st.floats(0.01, 1e4), st.text(max_size=5))
def test_the_rate_that_was_asked_for_is_offered(count: int, rate: float, seed: str) -> None:
    assert offered_rate(poisson_times(count, rate, seed)) == pytest.approx(rate)


def test_counts_in_windows_have_the_variance_of_a_poisson_process() -> None:
    times = poisson_times(20_000, 10.0, "other")
    counts = np.histogram(times, bins=np.arange(0.0, times[-1] - 1.0, 1.0))[0]
    assert abs(counts.var() / counts.mean() - 1.0) < 0.1


@given(st.integers(1, 50), st.floats(0.01, 1e4), st.text(max_size=5))
def test_another_rate_scales_the_same_arrivals(count: int, rate: float, seed: str) -> None:
    slow, fast = poisson_times(count, rate, seed), poisson_times(count, rate * 2, seed)
    assert len(slow) == count
    assert slow[0] == 0.0
    assert np.allclose(np.asarray(slow), np.asarray(fast) * 2)


def test_infinite_rate_is_all_at_once_and_has_no_offered_rate() -> None:
    times = poisson_times(5, math.inf, "seed")
    assert times == [0.0] * 5
    assert offered_rate(times) is None
    assert offered_rate([0.0, 0.5, 2.0]) == 1.0


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_must_be_positive(rate: float) -> None:
    with pytest.raises(ConfigError, match="--rate"):
        poisson_times(2, rate, "seed")


def test_repeats_arrive_differently_and_lengths_have_no_times_of_their_own() -> None:
    workload = planned(None, input_len="5", output_len="5", count=9)
    assert arrival_times(workload, 1.0, 0) == arrival_times(workload, 1.0, 0)
    assert arrival_times(workload, 1.0, 0) != arrival_times(workload, 1.0, 1)
    with pytest.raises(ConfigError, match="--rate"):
        arrival_times(workload, None, 0)


@given(st.floats(0.5, 40.0))
async def test_the_search_brackets_the_goodput(goodput: float) -> None:
    async def probe(rate: float) -> Probe:
        return Probe(rate, 1.0 if rate <= goodput else 0.5, valid=True)

    search = await search_goodput(probe, 1.0, 32.0, 0.9, 0.05)
    if goodput < 1.0:
        assert (search.passed, search.failed, len(search.probes)) == (None, 1.0, 1)
    elif goodput >= 32.0:
        assert (search.passed, search.failed, len(search.probes)) == (32.0, None, 2)
    else:
        assert search.passed is not None
        assert search.failed is not None
        assert search.passed <= goodput < search.failed
        assert search.failed - search.passed <= 0.05 * search.failed
        assert len(search.probes) <= 14


async def test_a_rate_that_the_client_cannot_send_is_not_the_servers_limit() -> None:
    async def probe(rate: float) -> Probe:
        return Probe(rate, 1.0, valid=rate < 5.0)

    search = await search_goodput(probe, 1.0, 9.0, 0.9, 0.1)
    assert search.passed is not None
    assert search.passed < 5.0
    assert search.limited_by_client
