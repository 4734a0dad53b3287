"""When requests are sent: Poisson arrivals, a trace's own times, or all at once."""

from __future__ import annotations

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
    """A Poisson process of `rate` whose first arrival is at 0. The same seed at another rate scales the same gaps, so
    that a search over rates compares like with like."""
    if not rate > 0:
        raise ConfigError("--rate", f"must be positive, not {rate}")
    rng = random.Random(seed)
    times = [0.0]
    for _ in range(count - 1):
        gap = rng.expovariate(1.0)
        times.append(times[-1] + (0.0 if math.isinf(rate) else gap / rate))
    return times[:count]


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
