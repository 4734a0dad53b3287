"""Figures of results: one beside each JSON, whatever rows are missing in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine.plots import engine_figure, kernels_figure, main, write_plot

DECODE = {"unit": "ms", "floor": 3.0, "ratio": 0.75, "peer": None, "details": {}}
ENGINE = [
    {"work": "engine start", "value": 3.7, "unit": "s", "floor": None, "ratio": None, "peer": None, "details": {}},
    {**DECODE, "work": "decode, batch 8, context 2048", "value": 4.0, "peer": 5.0},
    {**DECODE, "work": "decode, batch 1, context 2048", "value": 6.0, "ratio": 0.5},
    {**DECODE, "work": "decode, batch 256, context 2048", "value": None, "ratio": None, "floor": None},
    {**DECODE, "work": "prefill of 512", "value": 4.0},
    {**DECODE, "work": "mixed", "value": 10_400.0, "unit": "tok/s", "peer": 10_302, "ratio": None, "floor": None},
]
KERNEL = {
    "kernel": "decode_attention",
    "shape": "batch 1",
    "microseconds": 10.0,
    "share": 0.5,
    "sdpa_microseconds": {"cudnn": 8.0, "flash": None},
}


def axes_of(figure: Any) -> Any:
    return figure.axes


def test_points_are_shares_of_the_floor() -> None:
    decode, prefill, rates = axes_of(engine_figure({}, ENGINE))
    ours, peer = decode.lines
    assert list(ours.get_xdata()) == [1, 8]
    assert list(ours.get_ydata()) == [50.0, 75.0]
    assert list(peer.get_ydata()) == [pytest.approx(60.0)]
    assert list(prefill.lines[0].get_ydata()) == [75.0]
    assert [bar.get_height() for bar in rates.patches] == [10_400.0, 10_302.0]


def test_kernels_beside_sdpa() -> None:
    (axes,) = axes_of(kernels_figure({}, [KERNEL]))
    assert [bar.get_width() for bar in axes.patches] == [50.0]
    assert list(axes.lines[0].get_xdata()) == [pytest.approx(62.5)]  # the ceiling's share that 8 us would be
    assert len(axes.lines[1].get_xdata()) == 0


def test_writes_beside_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("a", ENGINE), ("b", [KERNEL])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    for name in ("a", "b"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "b.png" in capsys.readouterr().out
    (tmp_path / "c.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="no rows"):
        write_plot(tmp_path / "c.json")
    with pytest.raises(SystemExit):
        main([])
