"""From flags to settings: presets, ranges, and which flags exclude each other. Raises ConfigError naming the flag."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from baton.common.errors import ConfigError
from benchmarks.serve.lengths import parse_lengths
from benchmarks.serve.records import Counting
from benchmarks.serve.session import BenchSettings, SearchSettings
from benchmarks.serve.workload import PRESETS, Preset, WorkloadSettings

_FIRST_ORDINARY_TOKEN = 10
_NO_PRESET = Preset(None, None, None, 0)
Number = TypeVar("Number", int, float)


def workload_settings(
    *,
    name: str | None,
    input_len: str | None,
    output_len: str | None,
    trace: Path | None,
    time_scale: float,
    count: int | None,
    max_total_tokens: int | None,
    seed: int | None,
    token_ids: tuple[int, int],
) -> WorkloadSettings:
    """A preset's values, overridden by the other flags; or a trace."""
    if trace is not None and (name or input_len or output_len):
        raise ConfigError("--trace", "has its own lengths: leave out --workload, --input-len and --output-len")
    preset = _NO_PRESET if name is None else _preset(name)
    changed = input_len is not None or output_len is not None
    return WorkloadSettings(
        name=trace.name if trace is not None else "lengths" if changed or name is None else name,
        count=count if count is not None else preset.count,
        input_lengths=parse_lengths(input_len, "--input-len") if input_len else preset.input_lengths,
        output_lengths=parse_lengths(output_len, "--output-len") if output_len else preset.output_lengths,
        trace=trace,
        time_scale=time_scale,
        max_total_tokens=max_total_tokens,
        seed=seed if seed is not None else preset.seed,
        token_low=token_ids[0],
        token_high=token_ids[1],
    )


def token_range(text: str | None, vocab_size: int) -> tuple[int, int]:
    """First id and the one after the last; the ids below 10, where most vocabularies keep specials, are left out."""
    if text is None:
        return (min(_FIRST_ORDINARY_TOKEN, vocab_size - 1), vocab_size)
    low, high = _pair(text, "--token-ids", int)
    if not 0 <= low < high <= vocab_size:
        raise ConfigError("--token-ids", f"{text!r} is not a range of ids below --vocab-size {vocab_size}")
    return (low, high)


def search_settings(text: str | None) -> SearchSettings | None:
    """`LOW:HIGH` in requests per second."""
    if text is None:
        return None
    low, high = _pair(text, "--search-goodput", float)
    if not 0 < low < high < float("inf"):
        raise ConfigError("--search-goodput", f"{text!r}: 0 < LOW < HIGH")
    return SearchSettings(low, high)


def counting_of(text: str) -> Counting | None:
    """None for `auto`."""
    if text == "auto":
        return None
    try:
        return Counting(text)
    except ValueError as error:
        raise ConfigError("--count-tokens", f"{text!r} is not auto, {', '.join(Counting)}") from error


def extra_body(text: str | None) -> dict[str, Any]:
    """A JSON object, or nothing."""
    try:
        extra = json.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError("--extra-body", f"not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise ConfigError("--extra-body", "must be a JSON object")
    return extra


def milliseconds(value: float | None, flag: str) -> float | None:
    """Seconds; only positive bounds make sense."""
    if value is not None and not value > 0:
        raise ConfigError(flag, f"must be positive, not {value}")
    return None if value is None else value / 1000.0


def check_load(settings: BenchSettings, has_trace: bool) -> None:
    """Exactly one kind of load; a search needs something to search for."""
    kinds = {"--rate": settings.rate, "--concurrency": settings.concurrency, "--search-goodput": settings.search}
    given = [flag for flag, value in kinds.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(given[1], f"excludes {given[0]}")
    if not given and not has_trace:
        raise ConfigError("--rate", "give --rate, --concurrency or --search-goodput")
    if settings.rate is not None and not settings.rate > 0:
        raise ConfigError("--rate", f"must be positive, not {settings.rate}")
    if settings.search is not None and not settings.slo.given:
        raise ConfigError("--search-goodput", "needs --slo-ttft or --slo-tpot")


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ConfigError("--workload", f"{name!r} is none of {', '.join(PRESETS)}")
    return PRESETS[name]


def _pair(text: str, flag: str, parse: Callable[[str], Number]) -> tuple[Number, Number]:
    low, _, high = text.partition(":")
    try:
        return parse(low), parse(high)
    except ValueError as error:
        raise ConfigError(flag, f"{text!r} is not LOW:HIGH") from error
