"""Draws follow the distribution that the settings define, and depend on nothing but the row."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from baton.common.sampling import SamplingParams
from baton.engine.request import Request
from baton.engine.sampler import NOT_FINITE, gumbel, sample, sampling_rows

CPU = torch.device("cpu")


def a_request(length: int = 1, **params: object) -> Request:
    sampling = SamplingParams(max_tokens=1, **params)  # type: ignore[arg-type]
    return Request("a", [0] * length, sampling, 0.0)


def draw(logits: torch.Tensor, *requests: Request) -> list[int]:
    tokens: list[int] = sample(logits, sampling_rows(requests, logits.shape[-1], CPU)).tolist()
    return tokens


def draw_many(logits: list[float], count: int, **params: object) -> Counter[int]:
    """One draw at each of `count` positions."""
    rows = sampling_rows([a_request(1, **params)] * count, len(logits), CPU)
    tokens = sample(torch.tensor([logits] * count), replace(rows, position=torch.arange(1, count + 1)))
    return Counter(tokens.tolist())


def chi_square(counts: Counter[int], probabilities: dict[int, float]) -> float:
    total = counts.total()
    assert set(counts) <= set(probabilities)
    return sum((counts[t] - total * p) ** 2 / (total * p) for t, p in probabilities.items())


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert draw(logits, a_request(temperature=0.0), a_request(temperature=0.0)) == [1, 0]


@pytest.mark.parametrize("params", [{"seed": 1}, {"seed": 2**64 - 1}, {"seed": 1, "choice": 3}, {"temperature": 0.5}])
def test_distribution(params: dict[str, object]) -> None:
    """Chi-square with 5 degrees of freedom: above 20.5 in one of a thousand seeds; these seeds are fixed."""
    logits = [0.0, 1.0, -1.0, 2.0, 0.5, -0.5]
    heat = params.get("temperature", 1.0)
    assert isinstance(heat, float)
    weights = [math.exp(x / heat) for x in logits]
    expected = {token: weight / sum(weights) for token, weight in enumerate(weights)}
    assert chi_square(draw_many(logits, 20_000, **params), expected) < 20.5


def test_top_k_keeps_the_k_largest_and_their_proportions() -> None:
    counts = draw_many([0.0, 1.0, -1.0, 2.0, 0.5, -0.5], 20_000, top_k=3, seed=5)
    weights = {1: math.e, 3: math.e**2, 4: math.exp(0.5)}
    total = sum(weights.values())
    assert chi_square(counts, {token: weight / total for token, weight in weights.items()}) < 13.8


def test_top_k_cuts_equals_by_id() -> None:
    assert set(draw_many([1.0] * 2000, 100, top_k=2)) == {0, 1}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert set(draw_many(logits, 1000, top_p=0.3)) == {1}
    assert set(draw_many(logits, 1000, top_p=0.69)) == {1, 3}
    assert set(draw_many(logits, 1000, top_p=0.71)) == {1, 2, 3}
    assert set(draw_many(logits, 1000, top_p=1e-9)) == {1}
    counts = draw_many(logits, 20_000, top_p=0.69, seed=4)
    assert chi_square(counts, {1: 4 / 7, 3: 3 / 7}) < 10.8


def test_temperature_comes_before_top_k_and_top_k_before_top_p() -> None:
    """At temperature 4 the four are nearly even, so that 0.6 of the top three takes two; cold, one would do."""
    logits = [4.0, 3.0, 2.0, 1.0]
    assert set(draw_many(logits, 1000, top_k=3, top_p=0.6, temperature=4.0)) == {0, 1}
    assert set(draw_many(logits, 1000, top_k=3, top_p=0.6, temperature=1.0)) == {0}
    # Without top-k first, 0.6 would take three.
    assert set(draw_many(logits, 1000, top_p=0.75, temperature=4.0)) == {0, 1, 2}
    assert set(draw_many(logits, 1000, top_k=2, top_p=0.75, temperature=4.0)) == {0, 1}


def test_a_tiny_temperature_is_greedy() -> None:
    assert set(draw_many([1.0, 1.001, 0.0], 200, temperature=1e-30)) == {1}


def test_a_draw_depends_on_its_row_only() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    requests = [
        a_request(3, seed=9),
        a_request(4, temperature=0.0),
        a_request(5, seed=9, top_k=4),
        a_request(6, seed=2**63 + 5, top_p=0.5, temperature=2.0),
        a_request(7, seed=1, choice=2),
        a_request(8, seed=1, top_k=1000, top_p=1.0),
    ]
    together = draw(logits, *requests)
    assert [draw(logits[n : n + 1], r)[0] for n, r in enumerate(requests)] == together
    assert draw(logits.flip(0), *reversed(requests)) == together[::-1]


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"seed": 3 + 2**32}, {"seed": 3, "choice": 1}, {"seed": 3, "length": 2}]
)
def test_every_part_of_the_name_changes_the_draw(other: dict[str, int]) -> None:
    rows = [sampling_rows([r], 1000, CPU) for r in (a_request(1, seed=3), a_request(other.pop("length", 1), **other))]
    first, second = (gumbel(row, 1000) for row in rows)
    assert torch.corrcoef(torch.cat((first, second))).abs()[0, 1] < 0.15


def test_noise_is_finite_for_the_largest_and_smallest_word(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([[0, 0xFF, 0xFFFFFFFF]])
    monkeypatch.setattr("baton.engine.sampler.philox4x32", lambda *_: (words,) * 4)
    noise = gumbel(sampling_rows([a_request()], 3, CPU), 3)
    assert noise.isfinite().all()
    assert noise[0, 0] == noise[0, 1] < 0 < 17 < noise[0, 2] < 18


def test_logits_without_a_maximum_are_reported() -> None:
    logits = torch.zeros(4, 3)
    logits[0, 1] = torch.nan
    logits[1, 1] = torch.inf
    logits[2] = -torch.inf
    requests = [a_request(temperature=heat) for heat in (0.0, 1.0, 1.0, 0.0)]
    assert draw(logits, *requests) == [NOT_FINITE, NOT_FINITE, NOT_FINITE, 0]
