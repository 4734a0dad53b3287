"""`baton bench served`: plans that are read strictly, spans within one process, tables that say what failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.common.errors import ConfigError
from benchmarks.served.plan import merged, read_plan
from benchmarks.served.table import markdown
from benchmarks.served.timelines import describe_timelines

PLANS = Path(__file__).parents[3] / "benchmarks/served/plans"
LOAD = {"name": "a", "input": "8", "output": "4", "requests": 2, "rate": 1.0}


def write(folder: Path, text: str) -> Path:
    file = folder / "plan.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_plans_of_the_repository_are_valid() -> None:
    for file in sorted(PLANS.glob("*.yaml")):
        plan = read_plan(file)
        for layout in plan.layouts:
            config = plan.config_of(layout, Path("model"))
            assert config.server.port == config.server.grpc_port == 0
            assert (config.engine.load_format == "random") == (plan.shape is not None)
            assert layout.loads


def test_a_layout_overrides_key_by_key() -> None:
    shared = {"engine": {"block_size": 16, "max_num_seqs": 8}, "policy": "x"}
    assert merged(shared, {"engine": {"block_size": 32}}) == {
        "engine": {"block_size": 32, "max_num_seqs": 8},
        "policy": "x",
    }
    assert shared["engine"] == {"block_size": 16, "max_num_seqs": 8}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("shape: tiny\nmodel: m\nlayouts: []", "a shape or a model"),
        ("layouts: []", "a shape or a model"),
        ("shape: tiny\nlayouts: [{name: x, loads: [{name: l, input: '1', output: '1', requests: 1}]}]", "'l' takes"),
        ("shape: tiny\nlayouts: [{name: x, loads: [], lodas: []}]", "lodas"),
        ("shape: tiny\nlayouts: [", "cannot be read"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_plan(write(tmp_path, text))


def test_a_wrong_setting_of_a_layout_is_named(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, "shape: tiny\nlayouts: [{name: x, config: {engine: {block_sise: 1}}, loads: []}]"))
    with pytest.raises(ConfigError, match="block_sise"):
        plan.config_of(plan.layouts[0], Path("m"))


def timeline(*events: tuple[str, str, float], path: str = "remote") -> dict[str, Any]:
    return {
        "path": path,
        "attempts": [{}],
        "ttft_parts_us": {"queued": 1000, "delivery": 2000},
        "events": [{"source": source, "attempt": 1, "name": name, "at_s": at_s} for source, name, at_s in events],
    }


def test_spans_lie_within_one_process() -> None:
    """Prefill's end and decode's transfer end are on different clocks; a retry counts with its last worker."""
    first = timeline(
        ("prefill-a", "prefill_end", 1.0),
        ("prefill-a", "transfer_end", 1.5),
        ("prefill-b", "prefill_end", 3.0),
        ("prefill-b", "transfer_end", 3.25),
        ("decode-a", "transfer_end", 9.0),
        ("router", "first_token", 2.0),
        ("router", "second_token", 2.125),
    )
    summary = describe_timelines([first, timeline(path="local")])
    assert summary["sent_after_prefill_ms_p50"] == pytest.approx(250.0)
    assert summary["router_first_to_second_ms_max"] == pytest.approx(125.0)
    assert "second_after_commit_ms_p50" not in summary
    assert summary["part_delivery_ms_p50"] == pytest.approx(2.0)
    assert summary["paths"] == {"remote": 1, "local": 1}


def test_a_table_names_what_failed_and_what_was_not_run() -> None:
    row = {
        "layout": "two",
        "load": {**LOAD, "peer": {"ttft_ms_p50": 20.0}},
        "requests": 2,
        "invalid": ["late"],
        "summary": {"failed": 1, "output_tps": 1234.5, "ttft_ms_p50": 10.0, "ttft_ms_p99": 250.0},
        "server": {"paths": {"local": 2}},
    }
    table = markdown(
        {
            "rows": [row],
            "plan": {"peer": "theirs"},
            "starts": {"two": {"serving": [12.0]}},
            "not_run": [{"what": "three", "reason": "no GPU\nat all"}],
        }
    )
    assert "| two | a INVALID | 2 (1 failed) | 10.0 / 250 | - | - | - | 1,234 |" in table
    assert "10.0 / 20.0 = 0.50" in table
    assert table.endswith("Not run: three: no GPU\n")
