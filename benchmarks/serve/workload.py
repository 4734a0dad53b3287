"""Workloads: which requests are sent, in which order. Pure and seeded; no I/O except reading a trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baton.common.errors import ConfigError
from benchmarks.serve.lengths import Exponential, Fixed, Lengths, Uniform
from benchmarks.serve.tokens import Domain, TokenIds, TokenSource
from benchmarks.serve.trace import TraceRow, load_trace, trace_prompt


@dataclass(frozen=True)
class WorkloadSettings:
    """What is asked for. Either `trace`, or two length distributions and a count."""

    name: str
    count: int | None
    input_lengths: Lengths | None
    output_lengths: Lengths | None
    trace: Path | None
    time_scale: float
    max_total_tokens: int | None
    """Longest prompt plus answer; longer requests are left out and counted."""
    seed: int
    token_low: int
    token_high: int


@dataclass(frozen=True)
class Preset:
    """A named workload, so that figures of different days and servers are of the same requests."""

    count: int | None
    input_lengths: Lengths | None
    output_lengths: Lengths | None
    seed: int


PRESETS = {
    "fixed": Preset(512, Fixed(1024), Fixed(128), 0),
    "mixed": Preset(256, Uniform(100, 1024), Uniform(100, 1024), 0),
    "spread": Preset(512, Fixed(512), Exponential(128.0, 1536), 0),
    "serve-4k": Preset(150, Fixed(4096), Fixed(256), 0),
    "serve-long": Preset(80, Uniform(2048, 16384), Fixed(256), 3),
}


@dataclass(frozen=True)
class Planned:
    """One request to send. `prompt` makes the token ids of one run: runs differ, so none is served from a cache
    that the run before filled."""

    input_length: int
    output_length: int
    trace_time: float | None
    """Seconds after the start of the trace, scaled; None without a trace."""
    prompt: Callable[[TokenSource], TokenIds]


@dataclass(frozen=True)
class Workload:
    """The requests of a benchmark, the same in every run of it."""

    settings: WorkloadSettings
    requests: tuple[Planned, ...]
    left_out: int
    """Requests over `max_total_tokens`."""

    def prompts(self, run: int, limit: int | None = None) -> list[TokenIds]:
        """Token ids of the first `limit` requests in run number `run`; no two runs share a prompt."""
        settings = self.settings
        source = TokenSource(settings.seed * _RUN_STRIDE + run, settings.token_low, settings.token_high)
        return [planned.prompt(source) for planned in self.requests[:limit]]


def plan_workload(settings: WorkloadSettings) -> Workload:
    """Lengths and times of all requests. Raises ConfigError for a wrong setting or trace."""
    if not 0 <= settings.token_low < settings.token_high:
        raise ConfigError("--token-ids", f"{settings.token_low}:{settings.token_high} holds no token id")
    planned = _from_trace(settings, settings.trace) if settings.trace is not None else _from_lengths(settings)
    kept = tuple(p for p in planned if _fits(p, settings.max_total_tokens))
    if not kept:
        raise ConfigError("--max-total-tokens", f"none of {len(planned)} requests is that short")
    return Workload(settings, kept, len(planned) - len(kept))


def _from_lengths(settings: WorkloadSettings) -> list[Planned]:
    """All prompt lengths are drawn first, then all answer lengths, from one `random.Random(seed)`."""
    if settings.input_lengths is None or settings.output_lengths is None or not settings.count:
        raise ConfigError("--workload", "give a preset, a trace, or --input-len, --output-len and --num-requests")
    rng = random.Random(settings.seed)
    inputs = [settings.input_lengths.draw(rng) for _ in range(settings.count)]
    outputs = [settings.output_lengths.draw(rng) for _ in range(settings.count)]
    return [
        Planned(length, output, None, _prompt_of(index, length))
        for index, (length, output) in enumerate(zip(inputs, outputs, strict=True))
    ]


def _from_trace(settings: WorkloadSettings, path: Path) -> list[Planned]:
    if settings.time_scale <= 0:
        raise ConfigError("--time-scale", f"must be positive, not {settings.time_scale}")
    rows = load_trace(path, settings.count)
    start = rows[0].timestamp_ms
    return [
        Planned(
            row.input_length,
            row.output_length,
            (row.timestamp_ms - start) / 1000.0 * settings.time_scale,
            _prompt_of_row(row),
        )
        for row in rows
    ]


def _prompt_of(index: int, length: int) -> Callable[[TokenSource], TokenIds]:
    return lambda source: source.draw(Domain.PROMPT, index, length)


def _prompt_of_row(row: TraceRow) -> Callable[[TokenSource], TokenIds]:
    return lambda source: trace_prompt(row, source)


def _fits(planned: Planned, max_total_tokens: int | None) -> bool:
    return max_total_tokens is None or planned.input_length + planned.output_length <= max_total_tokens


_RUN_STRIDE = 1_000_003
