"""Figures of the engine's and the kernels' results: `python -m benchmarks.engine.plots RESULT.json …`.

Each figure is written beside its JSON. Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DECODE = re.compile(r"decode, batch (\d+), context (\d+)")
PREFILL = re.compile(r"prefill of (\d+)")


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit(__doc__)
    for argument in arguments:
        print(write_plot(Path(argument)))


def write_plot(result: Path) -> Path:
    """`result` with the ending .png. Raises ValueError for a file that holds neither kind of result."""
    content = json.loads(result.read_text(encoding="utf-8"))
    rows = content.get("rows", [])
    if any("work" in row for row in rows):
        figure = engine_figure(content, rows)
    elif any("kernel" in row for row in rows):
        figure = kernels_figure(content, rows)
    else:
        raise ValueError(f"{result} holds no rows of the engine or of kernels")
    path = result.with_suffix(".png")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return path


def engine_figure(content: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """Floor over measured by batch and context and by prompt, and throughput, each beside its peer."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    figure.suptitle(_title(content))
    decode_axes, prefill_axes, rate_axes = (figure.add_subplot(1, 3, i) for i in (1, 2, 3))
    decodes = [(match, row) for row in rows if (match := DECODE.fullmatch(row["work"])) and row["value"]]
    for context in sorted({int(match[2]) for match, _ in decodes}):
        of_context = [(int(match[1]), row) for match, row in decodes if int(match[2]) == context]
        decode_axes.plot(*_shares(of_context), "o-", label=f"context {context}")
        _plot_peer(decode_axes, of_context, f"vLLM 0.26's time, context {context}")
    prefills = [(int(match[1]), row) for row in rows if (match := PREFILL.fullmatch(row["work"])) and row["value"]]
    prefill_axes.plot(*_shares(prefills), "o-", label="Baton")
    _plot_peer(prefill_axes, prefills, "vLLM 0.26's time")
    for axes, label in ((decode_axes, "sequences in the batch"), (prefill_axes, "tokens of the prompt")):
        axes.set_xscale("log", base=2)
        _label(axes, label, "this run's floor / time, %")
        axes.set_ylim(50.0, 100.0)
    works = [row for row in rows if row["unit"] == "tok/s" and row["value"]]
    for offset, key, label in ((-0.2, "value", "Baton"), (0.2, "peer", "vLLM 0.26")):
        values = [row[key] or 0.0 for row in works]
        bars = rate_axes.bar([i + offset for i in range(len(works))], values, 0.4, label=label)
        rate_axes.bar_label(bars, fmt="%.0f", fontsize=8)
    rate_axes.set_xticks(range(len(works)), [row["work"] for row in works])
    _label(rate_axes, "", "tokens/s")
    return figure


def kernels_figure(content: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """Each kernel's share of its ceiling, and of SDPA's time on the same tensors where there is one."""
    figure = Figure(figsize=(11, 0.3 * len(rows) + 1.5), layout="constrained")
    figure.suptitle(_title(content))
    axes = figure.add_subplot(1, 1, 1)
    places = range(len(rows))
    axes.barh(places, [100.0 * row["share"] for row in rows], label="of the ceiling")
    for name, marker in (("cudnn", "D"), ("flash", "x")):
        found = [(row["sdpa_microseconds"].get(name), row, place) for place, row in zip(places, rows, strict=True)]
        points = [(100.0 * row["share"] * row["microseconds"] / us, place) for us, row, place in found if us]
        axes.plot([x for x, _ in points], [y for _, y in points], marker, color="black", label=f"SDPA {name}")
    axes.set_yticks(places, [f"{row['kernel']}, {row['shape']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    _label(axes, "%", "")
    return figure


def _shares(points: list[tuple[int, dict[str, Any]]]) -> tuple[list[int], list[float]]:
    with_floor = sorted((x, 100.0 * row["ratio"]) for x, row in points if row["ratio"])
    return [x for x, _ in with_floor], [y for _, y in with_floor]


def _plot_peer(axes: Axes, points: list[tuple[int, dict[str, Any]]], label: str) -> None:
    """The peer's time against our floor: the same work on another machine of the same type."""
    found = sorted((x, 100.0 * row["floor"] / row["peer"]) for x, row in points if row["peer"] and row["floor"])
    if found:
        axes.plot([x for x, _ in found], [y for _, y in found], "x--", color="grey", label=label)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _title(content: dict[str, Any]) -> str:
    day = str(content.get("date", ""))[:10]
    shape = content.get("shape", "shapes of llama-3.1-8b")
    return f"{content.get('gpu', 'unknown GPU')}, {shape}, {day}, {str(content.get('commit', ''))[:12]}"


if __name__ == "__main__":
    main(sys.argv[1:])
