"""Offline workloads: all requests at once, end-of-sequence ignored. The same lists every time."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """Tokens in and out of one request."""

    num_in: int
    num_out: int


def mixed() -> list[Job]:
    """256 requests, 100 to 1024 tokens in and out."""
    numbers = random.Random(0)
    ins = [numbers.randint(100, 1024) for _ in range(256)]
    return [Job(num_in, numbers.randint(100, 1024)) for num_in in ins]


def fixed() -> list[Job]:
    """512 requests, 1024 tokens in, 128 out."""
    return [Job(1024, 128)] * 512


def spread() -> list[Job]:
    """512 requests, 512 tokens in, exponential out: mean 128, drawn again above 1536."""
    numbers = random.Random(0)
    return [Job(512, _capped_exponential(numbers, 128.0, 1536)) for _ in range(512)]


WORKLOADS = {"mixed": mixed, "fixed": fixed, "spread": spread}


def _capped_exponential(numbers: random.Random, mean: float, cap: int) -> int:
    while True:
        drawn = round(numbers.expovariate(1 / mean))
        if 1 <= drawn <= cap:
            return drawn
