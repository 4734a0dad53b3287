"""When requests are sent: Poisson arrivals, a trace's own times, or all at once."""

from __future__ import annotations

import itertools
import math
import random

from baton.common.errors import ConfigError
from benchmarks.serve.workload import Workload


def arrival_times(workload: Workload, rate: float | None, run: int) -> list[float]:
    """Seconds after the start of the run, one per request, not decreasing.

    `rate` is in requests per second (infinite: all at once); None takes the trace's own times.
    """
    if rate is None:
        return _trace_times(workload)
    return poisson_times(len(workload.requests), rate, f"arrivals {workload.settings.seed} {run}")


def poisson_times(count: int, rate: float, seed: str) -> list[float]:
    """A Poisson process, given that `count` arrivals come at `rate` on average; the first is at 0.

    Drawn freely, three hundred gaps may well come to a rate that is a tenth off, which near saturation decides the
    result. So they are scaled to the rate that was asked for: the same seed at another rate has the same gaps, scaled.
    """
    if not rate > 0:
        raise ConfigError("--rate", f"must be positive, not {rate}")
    rng = random.Random(seed)
    times = [0.0, *itertools.accumulate(rng.expovariate(1.0) for _ in range(count - 1))][:count]
    span = times[-1] if times else 0.0
    if math.isinf(rate) or span == 0.0:
        return [0.0] * count
    return [at * (count - 1) / (rate * span) for at in times]


def offered_rate(times: list[float]) -> float | None:
    """Arrivals per second over the gaps that were really drawn; None when all arrive at once."""
    span = times[-1] - times[0] if times else 0.0
    return (len(times) - 1) / span if span > 0 else None


def _trace_times(workload: Workload) -> list[float]:
    times: list[float] = []
    for planned in workload.requests:
        if planned.trace_time is None:
            raise ConfigError("--rate", "give --rate or --concurrency: only a trace has arrival times of its own")
        times.append(planned.trace_time)
    return times
