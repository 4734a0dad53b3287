"""Two saved results side by side, with the ratio of every measure that both have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from baton.common.errors import ConfigError
from benchmarks.serve.report import FORMAT

_RATES = ("offered_rps", "carried_rps", "output_tps", "total_tps", "in_slo_share", "in_slo_rps", "failed")
_LATENCIES = ("ttft", "second_token", "tpot", "itl", "e2e")
_STATS = ("mean", "p50", "p90", "p95", "p99")
KEYS = (*_RATES, *(f"{name}_ms_{stat}" for name in _LATENCIES for stat in _STATS))
_SAME_WORKLOAD = (
    ("workload",),
    ("settings", "rate"),
    ("settings", "concurrency"),
    ("settings", "slo"),
    ("counting", "used"),
)


def load_result(path: Path) -> dict[str, Any]:
    """A saved result. Raises ConfigError for any other file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("--compare", f"cannot read {path}: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ConfigError("--compare", f"{path} is not a result of `baton bench serve` ({FORMAT})")
    return result


def ratios(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[float, float, float | None]]:
    """(median of the first, median of the second, second / first) by key; the ratio is None for a first of 0."""
    rows: dict[str, tuple[float, float, float | None]] = {}
    for key in KEYS:
        one, two = first["summary"].get(key), second["summary"].get(key)
        if one is not None and two is not None:
            a, b = float(one["median"]), float(two["median"])
            rows[key] = (a, b, b / a if a else None)
    return rows


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Why the two results should not be compared, or only with care."""
    found = [text for keys in _SAME_WORKLOAD for text in _unlike(".".join(keys), _at(first, keys), _at(second, keys))]
    for name, result in (("first", first), ("second", second)):
        found += [f"the {name} is invalid: {reason}" for reason in result["invalid"]]
    return found


def print_comparison(console: Console, first: Path, second: Path) -> None:
    """The table of ratios, after everything that makes it unfair."""
    one, two = load_result(first), load_result(second)
    for reason in differences(one, two):
        console.print(f"CAUTION {reason}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    table = Table(
        title="ratio is second / first; medians over runs", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("measure")
    for name in (one["label"] or first.stem, two["label"] or second.stem, "ratio"):
        table.add_column(name, justify="right")
    for key, (a, b, ratio) in ratios(one, two).items():
        table.add_row(key, f"{a:,.3f}", f"{b:,.3f}", "-" if ratio is None else f"{ratio:.3f}")
    console.print(table)


def _unlike(name: str, one: Any, two: Any) -> list[str]:
    """One line for each member that is not the same, recursively."""
    if isinstance(one, dict) and isinstance(two, dict):
        return [line for key in one | two for line in _unlike(f"{name}.{key}", one.get(key), two.get(key))]
    return [] if one == two else [f"{name} differs: {one} / {two}"]


def _at(result: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
