"""Where the device's time goes, kernel by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

_NAME_LENGTH = 90


def kernel_times(call: Callable[[], object], count: int) -> dict[str, float]:
    """Microseconds per call by kernel, the largest first; empty where there is no GPU."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    totals: Counter[str] = Counter()
    for event in recorded.key_averages():
        totals[event.key[:_NAME_LENGTH]] += event.self_device_time_total / count
    return {name: round(microseconds, 2) for name, microseconds in totals.most_common(30) if microseconds > 0}
