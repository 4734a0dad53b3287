"""Timing on a GPU, the ceilings that figures are compared with, and what a result file says about where it was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

_MIN_CALLS = 16


def require_gpu(program: str) -> torch.device:
    """The first GPU; ends the program with a message where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{program} measures GPU kernels, and torch {torch.__version__} finds no CUDA device here.")
    return torch.device("cuda", 0)


def seconds_per_call(calls: Sequence[Callable[[], object]], min_seconds: float = 0.3) -> float:
    """Time of one call, launch overhead excluded: the calls go into a CUDA graph, in turn, and the graph is replayed.

    Several calls over different buffers keep the cache cold. Every call must be legal in a graph and already correct.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    num_calls = -(-_MIN_CALLS // len(calls)) * len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            calls[i % len(calls)]()
    graph.replay()
    times: list[float] = []
    while len(times) < 5 or sum(times) < min_seconds:
        start, end = _timing_event(), _timing_event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / num_calls


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def measure_ceilings(device: torch.device, seconds: float = 2.0) -> dict[str, float]:
    """Sustained over `seconds` each: copy and read in GB/s, bf16 matrix product in TFLOP/s."""
    size = 2**30
    source, target = (torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2))
    # A kernel that reads and writes: a copy node of a graph reaches two thirds of its rate.
    copy = seconds_per_call([partial(torch.neg, source, out=target)], seconds)
    read = seconds_per_call([partial(torch.sum, source)], seconds)
    m, n, k = 8192, 28672, 4096
    a = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    b = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    product = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    matmul = seconds_per_call([partial(torch.mm, a, b.t(), out=product)], seconds)
    return {
        "copy_gb_s": 8 * size / copy / 1e9,
        "read_gb_s": 4 * size / read / 1e9,
        "matmul_tflop_s": 2 * m * n * k / matmul / 1e12,
    }


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Hardware, versions, date and commit; the commit is asked of git unless it is given."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "num_sms": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or git_commit(),
    }


def git_commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
