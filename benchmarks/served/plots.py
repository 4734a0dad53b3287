"""Figures of a result of `baton bench served`. Needs matplotlib; the command imports it where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_PANELS = {"ttft": "TTFT, ms", "second_token": "first to second token, ms", "tpot": "TPOT, ms", "itl": "ITL, ms"}


def write_plots(document: dict[str, Any], folder: Path) -> list[Path]:
    """`served.png`: the distribution of each latency, one row of panels per load, one line per layout."""
    rows = [row for row in document["rows"] if row["quantiles_ms"]]
    loads = list(dict.fromkeys(row["load"]["name"] for row in rows))
    if not loads:
        return []
    figure = Figure(figsize=(16, 3 * len(loads)), layout="constrained")
    panels = figure.subplots(len(loads), len(_PANELS), squeeze=False)
    for across, load in zip(panels, loads, strict=True):
        for axes, (name, label) in zip(across, _PANELS.items(), strict=True):
            for row in (row for row in rows if row["load"]["name"] == load and name in row["quantiles_ms"]):
                values = row["quantiles_ms"][name]
                axes.plot(values, np.linspace(0.0, 1.0, len(values)), label=row["layout"])
            axes.set_xlabel(label)
            axes.set_xscale("log")
            axes.grid(visible=True, which="both", alpha=0.3)
        across[0].set_ylabel(f"{load}\nshare")
        across[0].legend()
    FigureCanvasAgg(figure)
    file = folder / "served.png"
    figure.savefig(file, dpi=100)
    return [file]
