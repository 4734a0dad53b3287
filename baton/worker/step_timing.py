"""Fit of a worker's step time: seconds = base + a * prefill_tokens + b * decode_seqs, all three never negative.

Pure. Fed by the worker shell with every finished engine step (asyncio thread), read for each heartbeat.

Recursive least squares in information form: the normal equations are kept and old steps fade by `forgetting`. Steps
with and without prefill tokens fade separately, so an hour of pure decoding does not erase what prefill costs. The
solution is the exact non-negative one, found by trying each of the eight sets of coefficients that may be positive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
SIZE = 3  # base, prefill tokens, decode sequences


class StepTime(NamedTuple):
    """The fitted coefficients in seconds, and how many steps they rest on."""

    base_s: float
    per_prefill_token_s: float
    per_decode_seq_s: float
    samples: int

    def seconds(self, num_prefill_tokens: int, num_decode_seqs: int) -> float:
        return self.base_s + self.per_prefill_token_s * num_prefill_tokens + self.per_decode_seq_s * num_decode_seqs


@dataclass(slots=True)
class _Sums:
    """The fading normal equations of one kind of step: gram [3, 3], moment [3]."""

    gram: Vector = field(default_factory=lambda: np.zeros((SIZE, SIZE)))
    moment: Vector = field(default_factory=lambda: np.zeros(SIZE))

    def add(self, features: Vector, seconds: float, forgetting: float) -> None:
        self.gram = forgetting * self.gram + np.outer(features, features)
        self.moment = forgetting * self.moment + seconds * features


class StepTimeModel:
    """`forgetting` in (0, 1]: the weight that a step keeps when the next one of its kind is added."""

    def __init__(self, forgetting: float = 0.99) -> None:
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting must lie in (0, 1], got {forgetting}")
        self._forgetting = forgetting
        self._with_prefill = _Sums()
        self._decode_only = _Sums()
        self._samples = 0
        self._fitted = StepTime(0.0, 0.0, 0.0, 0)

    def add(self, num_prefill_tokens: int, num_decode_seqs: int, seconds: float) -> None:
        """Count one step. A step that held nothing says nothing and is ignored."""
        if num_prefill_tokens == 0 and num_decode_seqs == 0:
            return
        sums = self._with_prefill if num_prefill_tokens else self._decode_only
        sums.add(np.array([1.0, num_prefill_tokens, num_decode_seqs]), seconds, self._forgetting)
        self._samples += 1

    def fit(self) -> StepTime:
        """The best coefficients so far; zeros before the first step."""
        if self._fitted.samples == self._samples:
            return self._fitted
        gram = self._with_prefill.gram + self._decode_only.gram
        moment = self._with_prefill.moment + self._decode_only.moment
        base, per_prefill_token, per_decode_seq = (float(value) for value in _solve_non_negative(gram, moment))
        self._fitted = StepTime(base, per_prefill_token, per_decode_seq, self._samples)
        return self._fitted


def _solve_non_negative(gram: Vector, moment: Vector) -> Vector:
    """The x >= 0 with the least x.gram.x - 2 moment.x: gram [3, 3], moment [3] -> [3]."""
    best, best_loss = np.zeros(SIZE), 0.0
    for size in range(1, SIZE + 1):
        for free in combinations(range(SIZE), size):
            candidate = _solve_free(gram, moment, free)
            loss = float(candidate @ gram @ candidate - 2.0 * moment @ candidate)
            if (candidate >= 0.0).all() and loss < best_loss:
                best, best_loss = candidate, loss
    return best


def _solve_free(gram: Vector, moment: Vector, free: tuple[int, ...]) -> Vector:
    """Least squares in which only the coefficients `free` may differ from 0; the shortest one if several fit."""
    rows = np.array(free)
    scale = np.sqrt(np.diag(gram)[rows])
    scale[scale == 0.0] = 1.0
    scaled = gram[np.ix_(rows, rows)] / np.outer(scale, scale)
    solution = np.zeros(SIZE)
    solution[rows] = np.linalg.lstsq(scaled, moment[rows] / scale, rcond=1e-10)[0] / scale
    return solution
