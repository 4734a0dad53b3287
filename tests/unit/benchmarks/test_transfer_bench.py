"""The transfer bench: its figures by hand, and a whole run with two CPU workers in processes of their own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.cli.main import app
from benchmarks.transfer.figures import HandOver, Row, hand_over, percentiles, phases, step_ratio


def test_a_hand_over_is_timed_from_its_last_layer() -> None:
    sender = {"written": [(100, 2.0), (40, 3.5), (60, 3.0)], "events": {"prefill_start": 1.0}}
    receiver = {"admissible": 3.75, "events": {"admitted": 4.0}}
    assert hand_over(sender, receiver) == HandOver(200, prefill=2.5, exposed=0.25, boundary=0.25, span=1.75)


def _steps(busy: float, drift: float = 0.0) -> list[tuple[float, float, int, int]]:
    """A step every 10 ms from 0 to 3 s; those that lie within [1, 2] take `busy` times as long."""
    steps, end = [], 0.0
    while end < 3.0:
        seconds = 0.01 * (1 + drift * end) * (busy if 1.0 <= end < 2.0 else 1.0)
        end += seconds
        steps.append((end, seconds, 4, 0))
    return steps


def test_a_slower_step_is_seen_and_growing_contexts_are_not() -> None:
    assert step_ratio(_steps(busy=1.2), 4, (1.0, 2.0)).ratio == pytest.approx(1.2, rel=0.01)
    assert step_ratio(_steps(busy=1.0, drift=0.3), 4, (1.0, 2.0)).ratio == pytest.approx(1.0, rel=0.01)
    assert step_ratio(_steps(busy=1.2, drift=0.3), 4, (1.0, 2.0)).ratio == pytest.approx(1.2, rel=0.01)


def test_steps_of_other_batches_and_with_prompts_do_not_count() -> None:
    others = [(1.5, 9.0, 5, 0), (1.5, 9.0, 4, 16)] * 50
    assert step_ratio(_steps(busy=1.1) + others, 4, (1.0, 2.0)).ratio == pytest.approx(1.1, rel=0.01)


def test_too_few_steps_are_no_figure() -> None:
    with pytest.raises(ValueError, match="no step decoded 8"):
        step_ratio(_steps(busy=1.0), 8, (1.0, 2.0))
    with pytest.raises(ValueError, match="too few"):
        step_ratio(_steps(busy=1.0), 4, (0.0, 9.0))


def test_phases_leave_out_what_is_not_known() -> None:
    chunk = {"written_at": None, "announced_at": 1.0, "posted_at": 1.001, "received_at": 1.003, "verified_at": 1.004}
    assert phases([chunk]) == {
        "announced to posted": [1000.0, 1000.0],
        "posted to received": [2000.0, 2000.0],
        "received to verified": [1000.0, 1000.0],
    }


def test_percentiles_of_nothing_are_an_error() -> None:
    assert percentiles([1.0, 3.0]) == pytest.approx({"p50": 2.0, "p99": 2.98, "max": 3.0})
    with pytest.raises(ValueError, match="nothing"):
        percentiles([])


@pytest.mark.parametrize(
    ("row", "is_met"),
    [
        (Row("a", 2.0, "ms"), None),
        (Row("a", 2.0, "ms", at_most=2.0), True),
        (Row("a", 2.1, "ms", at_most=2.0), False),
        (Row("a", 84.0, "%", at_least=85.0), False),
        (Row("a", None, "%", at_least=85.0), False),
    ],
)
def test_bounds(row: Row, is_met: bool | None) -> None:
    assert row.is_met is is_met


def test_figures_are_drawn_and_rows_without_a_value_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = importlib.import_module("benchmarks.transfer.plots")
    rows = [
        Row("exposed, 512 tokens, layer groups, decode idle", 2.0, "ms", at_most=2.0),
        Row("exposed, 8192 tokens, layer groups, decode idle", None, "ms"),
        Row("bulk, 512 tokens, ready to admissible, of raw", 80.0, "%", details={"gb_s": 50.0, "raw_gb_s": 66.0}),
        Row("decode step, receiving flat out", 1.1, "x idle", details={"idle_p50_ms": 4.0, "busy_p50_ms": 4.4}),
    ]
    [path] = plots.write_plots([row.as_json() for row in rows], tmp_path / "transfer")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_part_is_named() -> None:
    outcome = CliRunner().invoke(app, ["bench", "transfer", "--part", "nonsense"])
    assert "part" in str(outcome.exception)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_on_cpus(tmp_path: Path) -> None:
    """Two prefill workers and a decode worker over gloo: the parts have figures, and their bytes are the model's."""
    out, tokens = tmp_path / "transfer.json", 112
    flags = (
        f"--shape tiny --device cpu --tokens {tokens} --repeats 1 --batch 2 --context 32 --slot-kib 16 --no-plot --hops"
    )
    parts = [flag for part in ("raw", "idle", "batch", "steps", "packing") for flag in ("--part", part)]
    arguments = ["bench", "transfer", *flags.split(), "--prefill-budget", "32", "--window-s", "0.6", *parts]
    outcome = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    rows = {row["work"]: row for row in json.loads(out.read_text())["rows"]}
    failed = {work: row["details"] for work, row in rows.items() if row["value"] is None}
    assert failed == {}
    kv_bytes = tokens // 16 * 2 * 2 * 16 * 2 * 16 * 4  # blocks; layers, K and V, tokens, heads, head dim, float32
    for how in ("layer groups", "after the compute"):
        for beside in ("decode idle", "decode at batch 2"):
            row = rows[f"exposed, {tokens} tokens, {how}, {beside}"]
            assert row["details"]["bytes"] == kv_bytes
            assert 0 < row["value"] < 5000
            assert row["details"]["prefill_ms"] > 0
            assert len(row["details"]["chunk_us"]) == 4, "a phase of the chunks was not noted"
            assert_way_of_a_chunk(row["details"]["hops"])
    bulk = rows[f"bulk, {tokens} tokens, ready to admissible, of raw"]
    assert bulk["details"]["bytes"] == kv_bytes
    assert 0 < bulk["value"] <= 100
    assert {row["unit"] for work, row in rows.items() if work.startswith("decode step")} == {"x idle"}


def assert_way_of_a_chunk(hops: list[tuple[float, str, str]]) -> None:
    """The last chunk's, through the threads of both ends, in the order in which one causes the next."""
    seq = max(int(what.split()[-2]) for _, _, what in hops if what.startswith("DecodeHalf._feed Chunk"))
    way = [
        ("prefill", f"SendLink._start_pack Pack {seq} wait >"),
        ("prefill", f"PrefillHalf._feed Packed {seq} <"),
        ("decode", f"DecodeHalf._feed Chunk {seq} <"),
        ("decode", f"RecvLink._start_recv StartRecv {seq} <"),
        ("decode", f"RecvLink._start_unpack Unpack {seq} wait >"),
        ("decode", f"DecodeHalf._feed Unpacked {seq} <"),
        ("decode", "DecodeHalf._admit Admit <"),
    ]
    times = [max(at for at, end, what in hops if (end, what) == hop) for hop in way]
    assert times == sorted(times)
    stamps = [at for at, _, _ in hops]
    assert stamps == sorted(stamps)
