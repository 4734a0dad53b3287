"""Distributions of prompt and answer lengths, written as `N`, `LOW:HIGH` or `exp:MEAN:CAP`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from baton.common.errors import ConfigError


class Lengths(Protocol):
    """Draws one length in tokens; the same generator state always gives the same length."""

    def draw(self, rng: random.Random) -> int: ...


@dataclass(frozen=True)
class Fixed:
    """Always `tokens`; takes nothing from the generator."""

    tokens: int

    def draw(self, rng: random.Random) -> int:  # noqa: ARG002
        return self.tokens


@dataclass(frozen=True)
class Uniform:
    """Every length from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class Exponential:
    """Exponential with `mean` before truncation to 1 … `cap`, rounded down."""

    mean: float
    cap: int

    def draw(self, rng: random.Random) -> int:
        return min(self.cap, max(1, int(rng.expovariate(1.0 / self.mean))))


def parse_lengths(text: str, flag: str) -> Lengths:
    """`512`, `100:1024` or `exp:128:1536`. Raises ConfigError that names `flag`."""
    try:
        lengths = _parse(text.split(":"))
    except ValueError as error:
        raise ConfigError(flag, f"{text!r} is not N, LOW:HIGH or exp:MEAN:CAP") from error
    if lengths is None:
        raise ConfigError(flag, f"{text!r}: lengths are at least 1, LOW <= HIGH, MEAN > 0")
    return lengths


def _parse(parts: list[str]) -> Lengths | None:
    """None for numbers out of range; ValueError for another form."""
    match parts:
        case ["exp", mean, cap]:
            return Exponential(float(mean), int(cap)) if 0 < float(mean) < float("inf") and int(cap) >= 1 else None
        case [low, high]:
            return Uniform(int(low), int(high)) if 1 <= int(low) <= int(high) else None
        case [tokens]:
            return Fixed(int(tokens)) if int(tokens) >= 1 else None
    raise ValueError(parts)
