"""The sampling kernels draw exactly what the engine's sampler draws."""

from __future__ import annotations

import math

import pytest
import torch

from baton.engine.kernels import sampling
from baton.engine.sampler import SamplingRows, max_distance
from baton.engine.sampler import sample as reference_sample

VOCAB = 700


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TILE", 256)
    monkeypatch.setattr(sampling, "TILES_PER_PROGRAM", 2)
    monkeypatch.setattr(sampling, "LIMIT_TILE", 512)


def draw(
    logits: torch.Tensor,
    temperature: list[float],
    top_k: list[int],
    top_p: list[float],
    min_p: list[float] | None = None,
) -> tuple[list[int], list[int]]:
    """Tokens of the kernel and of the reference."""
    n, vocab = logits.shape
    device = logits.device
    seed = torch.randint(-(2**63), 2**63 - 1, (n,))
    choice, position = torch.arange(n) % 3, torch.randint(0, 200_000, (n,))
    t, p = torch.tensor(temperature), torch.tensor(top_p)
    k, distance = torch.tensor(top_k), torch.tensor([max_distance(value) for value in min_p or [0.0] * n])
    arguments = (x.to(device) for x in (t, k, p, distance, seed, choice, position))
    found = sampling.sample(logits, *arguments).tolist()
    drawn = torch.nonzero(t > 0).flatten()
    rows = SamplingRows(
        drawn=drawn,
        temperature=t[drawn].clamp(min=1e-6),
        top_k=torch.where((k > 0) & (k < vocab), k, vocab)[drawn],
        top_p=p[drawn],
        key_low=seed[drawn] & 0xFFFFFFFF,
        key_high=(seed[drawn] >> 32) & 0xFFFFFFFF,
        position=position[drawn],
        choice=choice[drawn],
        any_drawn=bool(len(drawn)),
        any_restricted=True,
        max_distance=distance[drawn],
    )
    return found, reference_sample(logits.float().cpu(), rows).tolist()


def test_plain_draws(device: torch.device) -> None:
    logits = (torch.randn(6, VOCAB) * 2).to(device)
    found, expected = draw(logits, [1.0, 0.7, 1.9, 0.0, 1e-9, 1.0], [-1] * 6, [1.0] * 6)
    assert found == expected


def test_top_k_and_top_p(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LIMIT_TILE", 1024)
    logits = (torch.randn(6, VOCAB) * 2).to(device)
    top_k = [1, 40, VOCAB + 5, -1, 0, 300]
    top_p = [1.0, 1.0, 0.5, 0.9, 0.01, 0.8]
    found, expected = draw(logits, [0.7, 1.9, 1.0, 1.0, 1.0, 1.3], top_k, top_p)
    assert found == expected


def test_min_p_alone_and_behind_the_others(device: torch.device) -> None:
    """Each row has settings of its own; which of the limits cuts is another one from row to row."""
    logits = (torch.randn(8, VOCAB) * 2).to(device)
    min_p = [0.3, 1.0, 1e-30, 0.7, 0.05, 0.3, 0.001, 0.2]
    top_k = [-1, -1, -1, -1, -1, 60, 4, 100]
    top_p = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.9]
    found, expected = draw(logits, [1.0, 1.0, 0.7, 0.0, 1.9, 1.0, 1.0, 1.0], top_k, top_p, min_p)
    assert found == expected
    assert [found[row] == int(logits[row].argmax()) for row in (1, 3)] == [True, True]


def test_min_p_keeps_all_that_are_exactly_as_likely(device: torch.device) -> None:
    """Of equal tokens top-k keeps the lower ids, min-p every one."""
    logits = torch.zeros(8, 90)
    logits[:, 60] = 2.0
    top_k, least = [-1] * 6 + [3] * 2, [math.exp(-2)] * 6 + [0.0, math.exp(-2)]
    found, expected = draw(logits.to(device), [1.0] * 8, top_k, [1.0] * 8, least)
    assert found == expected
    assert len(set(found[:6])) > 2
    assert set(found[6:]) <= {0, 1, 60}


def test_ties_are_cut_by_id(device: torch.device) -> None:
    """Few distinct logits: nearly every limit falls among equal tokens."""
    logits = torch.randn(5, VOCAB).round().to(device)
    top_k = [3, 200, -1, 100, 2]
    top_p = [1.0, 1.0, 0.77, 0.41, 0.35]
    found, expected = draw(logits, [1.0] * 5, top_k, top_p)
    assert found == expected


def test_equal_logits_greedy_takes_the_lowest_id(device: torch.device) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [650, 300, 301]] = 2.5
    found, _ = draw(logits.to(device), [0.0, 0.0], [-1, 5], [1.0, 0.5])
    assert found == [300, 0]


def test_excluded_tokens_and_rows_without_a_maximum(device: torch.device) -> None:
    logits = torch.randn(5, VOCAB)
    logits[0, 10:] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 500] = torch.nan
    logits[3, 500] = torch.inf
    logits[4, : VOCAB - 1] = -torch.inf
    found, expected = draw(
        logits.to(device), [1.0, 1.0, 1.0, 0.0, 1.0], [50, -1, -1, -1, -1], [0.99, 0.5, 1.0, 1.0, 0.9]
    )
    assert found == expected
    assert found[1:] == [-1, -1, -1, VOCAB - 1]


def test_a_draw_depends_on_its_row_alone(device: torch.device) -> None:
    row = torch.randn(1, VOCAB).to(device)
    arguments = [torch.tensor([x]).to(device) for x in (1.0, -1, 1.0, math.inf, 42, 1, 77)]
    alone = sampling.sample(row, *arguments)
    batch = torch.cat((torch.randn(3, VOCAB).to(device), row))
    together = sampling.sample(batch, *(torch.cat((x, x, x, x)) for x in arguments))
    assert together[3] == alone[0]
    eight = [x.expand(8).contiguous() for x in arguments]
    eight[-1] += torch.arange(8, device=device)
    assert len(set(sampling.sample(row.expand(8, VOCAB).contiguous(), *eight).tolist())) > 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too many rows for the interpreter")
def test_frequencies_follow_the_probabilities(device: torch.device) -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    logits = probabilities.log().expand(n, 4).contiguous().to(device)
    ones = torch.ones(n, device=device)
    off, zero = torch.full((n,), -1, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    tokens = sampling.sample(logits, ones, off, ones, ones * math.inf, zero + 5, zero, torch.arange(n, device=device))
    frequencies = torch.bincount(tokens.cpu(), minlength=4) / n
    assert ((frequencies - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / n).sqrt()).all()


def test_refuses_other_dtypes(device: torch.device) -> None:
    one, zero = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="int64"):
        sampling.sample(torch.zeros(1, 4, device=device), one, zero, one, one, zero, zero, zero.int())
