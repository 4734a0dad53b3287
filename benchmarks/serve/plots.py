"""Figures of a result. The only module here that needs matplotlib; the command imports it for `--plot` only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.serve import metrics
from benchmarks.serve.metrics import Samples
from benchmarks.serve.records import Run

_BINS = 100


def write_plots(runs: Sequence[Run], stem: Path, title: str) -> list[Path]:
    """`<stem>-cdf.png` over all runs and `<stem>-timeline.png` of the first one; returns their paths."""
    records = [record for run in runs for record in run.records if record.ok]
    gaps = [metrics.inter_token_latencies(record) for record in records]
    samples = {
        "TTFT": np.array([value for record in records if (value := metrics.ttft(record)) is not None]),
        "TPOT": np.array([value for record in records if (value := metrics.tpot(record)) is not None]),
        "ITL": np.concatenate(gaps) if gaps else np.array([]),
    }
    return [
        _save(_cdf_figure(samples, title), stem.with_name(f"{stem.name}-cdf.png")),
        _save(_timeline_figure(runs[0], title), stem.with_name(f"{stem.name}-timeline.png")),
    ]


def _cdf_figure(samples: dict[str, Samples], title: str) -> Figure:
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(title)
    for position, (name, values) in enumerate(samples.items(), start=1):
        axes = figure.add_subplot(1, len(samples), position)
        ordered = np.sort(values) * 1000.0
        axes.plot(ordered, np.arange(1, len(ordered) + 1) / max(len(ordered), 1))
        if len(ordered):  # The last thousandth would squeeze the rest into the axis.
            axes.set_xlim(0.0, float(np.percentile(ordered, 99.9)) * 1.05 + 1e-9)
        _label(axes, f"{name}, ms", "share of tokens" if name == "ITL" else "share of requests")
    return figure


def _timeline_figure(run: Run, title: str) -> Figure:
    """Over time: output tokens per second, requests under way, and TTFT by the time of sending."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    edges = np.linspace(0.0, max(run.ended - run.started, 1e-9), _BINS + 1)
    rate_axes, running_axes, ttft_axes = (figure.add_subplot(3, 1, row) for row in (1, 2, 3))
    rate_axes.step(edges[:-1], _tokens_per_second(run, edges), where="post")
    _label(rate_axes, "", "output tok/s")
    running_axes.plot(edges, requests_under_way(run, edges))
    _label(running_axes, "", "requests under way")
    points = [(r.started - run.started, (metrics.ttft(r) or 0.0) * 1000.0) for r in run.records if r.ok]
    failed = [r.started - run.started for r in run.records if not r.ok]
    ttft_axes.plot([x for x, _ in points], [y for _, y in points], ".", label="first token")
    if failed:
        ttft_axes.plot(failed, [0.0] * len(failed), "x", color="red", label="failed")
        ttft_axes.legend()
    for axes in (rate_axes, running_axes, ttft_axes):
        axes.set_xlim(0.0, edges[-1])
    _label(ttft_axes, "sent, s after the start", "TTFT, ms")
    return figure


def requests_under_way(run: Run, at: Samples) -> Samples:
    """[len(at)]: requests that had been sent and had not ended, `at` seconds after the start."""
    started = np.sort([record.started - run.started for record in run.records])
    ended = np.sort([record.ended - run.started for record in run.records])
    return np.asarray(np.searchsorted(started, at, "right") - np.searchsorted(ended, at, "right"), dtype=np.float64)


def _tokens_per_second(run: Run, edges: Samples) -> Samples:
    times = [metrics.token_times(record) - run.started for record in run.records]
    counts, _ = np.histogram(np.concatenate(times), bins=edges)
    return np.asarray(counts / np.diff(edges), dtype=np.float64)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, alpha=0.3)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)
    return path
