"""Drawing the next token of every row from its logits. Runs on the engine thread; no state.

A row is drawn by a Gumbel race: every token gets logit / temperature - log(-log(u)), the largest wins. u comes from
Philox with key (seed, low word first) and counter (token id, absolute position of the drawn token, choice, 0), so that
a row's draw depends on nothing but the row: neither on the batch nor on the worker. Order of the settings: temperature,
then top-k (ties at the edge: lower ids first), then top-p (the fewest tokens whose probability reaches it), then min-p.
What comes before them is in `baton.engine.logit_edits`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from baton.engine.philox import philox4x32
from baton.engine.request import Request
from baton.engine.staging import to_device

NOT_FINITE = -1
_WORD = 0xFFFFFFFF
_MIN_TEMPERATURE = 1e-6  # a float32 that is not flushed to zero


class TokenSampler(Protocol):
    """Draws on the device of the logits, without waiting for it where that can be avoided."""

    def sample(
        self, logits: torch.Tensor, requests: Sequence[Request], positions: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        """logits: [num_rows, vocab_size]; `positions`: where in its sequence each request's token will stand.

        Returns int64 [num_rows], NOT_FINITE where a row has no finite maximum.
        """
        ...


class TorchSampler:
    """Implements `TokenSampler` in plain torch."""

    def sample(
        self, logits: torch.Tensor, requests: Sequence[Request], positions: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        return sample(logits.float(), sampling_rows(requests, logits.shape[-1], logits.device, positions.tolist()))


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Settings of the rows to draw, [num_rows] each on the logits' device.

    `drawn` (int64) lists the rows that are not greedy; all other tensors have one entry per drawn row. `top_k` is the
    vocabulary's size where it is off. `max_distance`: see the function; None where it is off in every row.
    """

    drawn: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    key_low: torch.Tensor
    key_high: torch.Tensor
    position: torch.Tensor
    choice: torch.Tensor
    any_drawn: bool
    any_restricted: bool
    max_distance: torch.Tensor | None = None


def max_distance(min_p: float) -> float:
    """How far from the largest a token's logit may lie, both divided by the temperature; infinity where min-p is off.

    On the host, so that all samplers cut at the same float32. Never -0.0, whose bits are not in the order of numbers.
    """
    return abs(math.log(min_p)) if min_p > 0 else math.inf


def sampling_rows(
    requests: Sequence[Request], vocab_size: int, device: torch.device, positions: Sequence[int] | None = None
) -> SamplingRows:
    """Settings of the next token of each request, in order. `positions` of the tokens: by default after the known."""
    if positions is None:
        positions = [len(r.token_ids) for r in requests]
    drawn = [(row, r, r.sampling) for row, r in enumerate(requests) if r.sampling.temperature > 0]
    top_k = [min(s.top_k, vocab_size) if s.top_k > 0 else vocab_size for _, _, s in drawn]

    def words(values: list[int]) -> torch.Tensor:
        return to_device(values, torch.int64, device)

    def reals(values: list[float]) -> torch.Tensor:
        return to_device(values, torch.float32, device)

    return SamplingRows(
        drawn=words([row for row, _, _ in drawn]),
        temperature=reals([max(s.temperature, _MIN_TEMPERATURE) for _, _, s in drawn]),
        top_k=words(top_k),
        top_p=reals([s.top_p for _, _, s in drawn]),
        key_low=words([s.seed & _WORD for _, _, s in drawn]),
        key_high=words([s.seed >> 32 for _, _, s in drawn]),
        position=words([positions[row] for row, _, _ in drawn]),
        choice=words([s.choice for _, _, s in drawn]),
        any_drawn=bool(drawn),
        any_restricted=any(k < vocab_size or s.top_p < 1 for k, (_, _, s) in zip(top_k, drawn, strict=True)),
        max_distance=reals([max_distance(s.min_p) for _, _, s in drawn]) if any(s.min_p for _, _, s in drawn) else None,
    )


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """logits: float32 [num_rows, vocab_size]. Returns int64 [num_rows]; NOT_FINITE where the logits have no maximum.

    Greedy rows take the largest logit, the lowest id where several are equal.
    """
    tokens = logits.argmax(dim=-1)
    if rows.any_drawn:
        tokens[rows.drawn] = _draw(logits[rows.drawn], rows)
    return torch.where(logits.amax(dim=-1).isfinite(), tokens, NOT_FINITE)


def _draw(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    # The largest logit becomes 0 first: a small temperature must not overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / rows.temperature.unsqueeze(-1)
    if rows.any_restricted:
        scaled = _restrict(scaled, rows.top_k.unsqueeze(-1), rows.top_p.unsqueeze(-1))
    if rows.max_distance is not None:
        # The largest is 0 here, so a token's probability relative to the likeliest is the exponential of its own.
        scaled = scaled.masked_fill(scaled < -rows.max_distance.unsqueeze(-1), -torch.inf)
    return (scaled.double() + gumbel(rows, logits.shape[-1])).argmax(dim=-1)


def gumbel(rows: SamplingRows, vocab_size: int) -> torch.Tensor:
    """Noise for every token of every drawn row: float64 [num_drawn, vocab_size].

    In float32 the largest u would round to 1 and its noise to infinity, once in 2^24 tokens; float64 holds every u.
    """
    token_ids = torch.arange(vocab_size, device=rows.drawn.device)
    columns = (rows.position, rows.choice, torch.zeros_like(rows.choice))
    position, choice, zero = (column.unsqueeze(-1) for column in columns)
    key = (rows.key_low.unsqueeze(-1), rows.key_high.unsqueeze(-1))
    word = philox4x32((token_ids, position, choice, zero), key)[0]
    u = ((word >> 8).double() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(u))


def _restrict(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set what top-k and top-p exclude to minus infinity. The most likely token always stays."""
    ranked, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    ranked = ranked.masked_fill(rank >= top_k, -torch.inf)
    probability = ranked.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    ranked = ranked.masked_fill((before >= top_p) & (top_p < 1) & (rank > 0), -torch.inf)
    return torch.empty_like(scaled).scatter_(-1, order, ranked)
