"""Fit of a worker's step time: seconds = base + a * prefill_tokens + b * decode_seqs, all three never negative.

Pure. Fed by the worker shell with every finished engine step (asyncio thread), read for each heartbeat.

Recursive least squares in information form: the normal equations are kept and old steps fade by `forgetting`. Steps
with and without prefill tokens fade separately, so an hour of pure decoding does not erase what prefill costs. The
solution is the exact non-negative one, found by trying each of the eight sets of coefficients that may be positive.
In plain floats: on three coefficients an array library spends a hundred times as long on its own calls, and every
heartbeat would hold up the chunks and tokens of the asyncio thread for milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

Vector = list[float]
Matrix = list[Vector]
SIZE = 3  # base, prefill tokens, decode sequences
SETS = tuple(free for size in range(1, SIZE + 1) for free in combinations(range(SIZE), size))
RIDGE = 1e-10  # of a scaled equation's diagonal: where several solutions fit, about the shortest one


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

    gram: Matrix = field(default_factory=lambda: [[0.0] * SIZE for _ in range(SIZE)])
    moment: Vector = field(default_factory=lambda: [0.0] * SIZE)

    def add(self, features: Vector, seconds: float, forgetting: float) -> None:
        for i, feature in enumerate(features):
            row = self.gram[i]
            for j, other in enumerate(features):
                row[j] = forgetting * row[j] + feature * other
            self.moment[i] = forgetting * self.moment[i] + seconds * feature


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
        sums.add([1.0, float(num_prefill_tokens), float(num_decode_seqs)], seconds, self._forgetting)
        self._samples += 1

    def fit(self) -> StepTime:
        """The best coefficients so far; zeros before the first step."""
        if self._fitted.samples == self._samples:
            return self._fitted
        one, other = self._with_prefill, self._decode_only
        gram = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(one.gram, other.gram, strict=True)]
        moment = [a + b for a, b in zip(one.moment, other.moment, strict=True)]
        self._fitted = StepTime(*_solve_non_negative(gram, moment), self._samples)
        return self._fitted


def _solve_non_negative(gram: Matrix, moment: Vector) -> tuple[float, float, float]:
    """The x >= 0 with the least x.gram.x - 2 moment.x: gram [3, 3], moment [3] -> [3]."""
    best, best_loss = [0.0] * SIZE, 0.0
    for free in SETS:
        x = _solve_free(gram, moment, free)
        loss = sum(x[i] * (sum(gram[i][j] * x[j] for j in free) - 2.0 * moment[i]) for i in free)
        if loss < best_loss and all(x[i] >= 0.0 for i in free):
            best, best_loss = x, loss
    return best[0], best[1], best[2]


def _solve_free(gram: Matrix, moment: Vector, free: tuple[int, ...]) -> Vector:
    """Least squares in which only the coefficients `free` may differ from 0: elimination on the scaled equations."""
    scale = [math.sqrt(gram[i][i]) or 1.0 for i in free]
    rows = [[gram[i][j] / (a * b) for j, b in zip(free, scale, strict=True)] for i, a in zip(free, scale, strict=True)]
    right = [moment[i] / a for i, a in zip(free, scale, strict=True)]
    for k, row in enumerate(rows):
        row[k] = max(row[k], 0.0) + RIDGE
        for i in range(k + 1, len(rows)):
            factor = rows[i][k] / row[k]
            rows[i] = [mine - factor * other for mine, other in zip(rows[i], row, strict=True)]
            right[i] -= factor * right[k]
    solution = [0.0] * SIZE
    for k in reversed(range(len(free))):
        known = sum(rows[k][j] * solution[free[j]] * scale[j] for j in range(k + 1, len(free)))
        solution[free[k]] = (right[k] - known) / rows[k][k] / scale[k]
    return solution
