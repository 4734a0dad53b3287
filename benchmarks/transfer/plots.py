"""Figures of a transfer result. The only module here that needs matplotlib; the command imports it by name."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_EXPOSED = re.compile(r"exposed, (\d+) tokens, (.+)")
_BULK = re.compile(r"bulk, (\d+) tokens, ")


def write_plots(rows: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    """`<stem>.png`: exposed time and bandwidth over prompt length, and decode's step ratios. Returns the paths."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    exposed, bulk, steps = figure.subplots(1, 3)
    _exposed(exposed, rows)
    _bulk(bulk, rows)
    _steps(steps, rows)
    path = stem.with_name(f"{stem.name}.png")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)
    return [path]


def _exposed(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        match = _EXPOSED.fullmatch(row["work"])
        if match and row["value"] is not None:
            lines[match[2]].append((int(match[1]), row["value"]))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    if lines:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    _label(axes, "prompt tokens", "last layer computed to admissible, ms")


def _bulk(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    points = sorted(
        (int(match[1]), row["details"]["gb_s"], row["details"].get("raw_gb_s"))
        for row in rows
        if (match := _BULK.match(row["work"])) and row["value"] is not None
    )
    if points:
        tokens = [point[0] for point in points]
        axes.plot(tokens, [point[1] for point in points], "o-", label="ready to admissible")
        axes.plot(tokens, [point[2] for point in points], "x--", label="raw, same messages")
        axes.set_xscale("log", base=2)
        axes.legend(fontsize="small")
    _label(axes, "prompt tokens", "GB/s")


def _steps(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    bars = [row for row in rows if row["unit"] == "x idle"]
    names = [textwrap.fill(row["work"].removeprefix("decode step, "), 24) for row in bars]
    values = [row["value"] for row in bars]
    axes.barh(names, values)
    axes.axvline(1.0, color="black", linewidth=0.8)
    _label(axes, "decode step, of idle", "")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, alpha=0.3)
