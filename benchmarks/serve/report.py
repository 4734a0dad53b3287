"""Turns a result into JSON and into tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.serve import metrics
from benchmarks.serve.records import Counting, RequestRecord, Run
from benchmarks.serve.session import BenchResult, MeasuredRun

FORMAT = "baton.bench.serve/1"
_SAMPLE_FAILURES = 5
_LATENCIES = {
    "ttft": "TTFT",
    "second_token": "first to second",
    "tpot": "TPOT (per request)",
    "itl": "ITL (per token)",
    "e2e": "end to end",
    "client_lag": "client lag",
}
_STATS = ("mean", *(f"p{p}" for p in metrics.PERCENTILES), "max")


def to_json(
    result: BenchResult, environment: dict[str, Any], counting: dict[str, Any], records: bool
) -> dict[str, Any]:
    """The whole result; `records` adds every request of every run."""
    return {
        "format": FORMAT,
        "label": result.settings.label,
        "valid": not result.invalid,
        "invalid": result.invalid,
        "settings": plain(result.settings),
        "workload": {**_plain_dict(result.workload.settings), "requests": len(result.workload.requests)}
        | {"left_out_too_long": result.workload.left_out},
        "environment": environment,
        "counting": {**counting, "used": sorted(result.counted_by)},
        "summary": metrics.combine([run.summary for run in result.runs]),
        "search": None if result.search is None else _search_json(result),
        "runs": [_run_json(run, records) for run in result.runs],
    }


def print_result(console: Console, result: BenchResult) -> None:
    """Tables for people; says what is wrong with the run before anything else."""
    for reason in result.invalid:
        console.print(f"INVALID {reason}", style="bold red", highlight=False, markup=False, soft_wrap=True)
    _print_failures(console, result)
    summary = metrics.combine([run.summary for run in result.runs])
    console.print(_rates_table(summary, len(result.runs)))
    console.print(_latency_table("latency in ms" + _of_runs(len(result.runs)), summary))
    for path, latencies in metrics.by_path(_all_records(result.runs)).items():
        count = sum(record.path == path for record in _all_records(result.runs))
        console.print(_latency_table(f"path {path}, {count} requests, ms", metrics.combine([latencies])))
    if result.counted_by == {Counting.CHUNKS}:
        console.print("The server gives no token count per chunk: one token a chunk is assumed for ITL.")
    if (uncounted := summary["uncounted_tokens"]) and uncounted["max"]:
        console.print(f"{uncounted['max']:.0f} tokens of the usage came in no chunk of their own: ITL leaves them out.")
    if result.search is not None:
        console.print(goodput_line(result))


def goodput_line(result: BenchResult) -> str:
    """The outcome of a search in one sentence."""
    search = result.search
    assert search is not None
    if search.passed is None:
        return f"goodput is below {search.failed:.3g} req/s" if search.failed else "no rate was tried"
    bound = f"below {search.failed:.3g}" if search.failed is not None else "the highest rate tried passes"
    client = ", where the client could not keep up" if search.limited_by_client else ""
    return f"goodput {search.passed:.3g} req/s with {search.share:.0%} in SLO ({bound}{client})"


def plain(value: Any) -> Any:
    """Dataclasses, enums and paths as JSON types, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__.lower(), **_plain_dict(value)}
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Enum | Path):
        return str(value.value if isinstance(value, Enum) else value.name)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _plain_dict(value: Any) -> dict[str, Any]:
    return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _search_json(result: BenchResult) -> dict[str, Any]:
    assert result.search is not None
    return {**_plain_dict(result.search), "limited_by_client": result.search.limited_by_client}


def _run_json(measured: MeasuredRun, records: bool) -> dict[str, Any]:
    run = measured.run
    failed = [record for record in run.records if not record.ok]
    entry: dict[str, Any] = {
        "summary": measured.summary,
        "by_path": metrics.by_path(run.records),
        "failures": metrics.failures(run.records),
        "failure_samples": [_record_json(record, run) for record in failed[:_SAMPLE_FAILURES]],
        "invalid": measured.invalid,
    }
    if records:
        entry["records"] = [_record_json(record, run) for record in run.records]
    return entry


def _record_json(record: RequestRecord, run: Run) -> dict[str, Any]:
    """Times count from the start of the run."""
    entry = _plain_dict(record)
    for key in ("scheduled", "started", "ended"):
        entry[key] = None if entry[key] is None else round(entry[key] - run.started, 6)
    entry["chunk_times"] = [round(time - run.started, 6) for time in record.chunk_times]
    return entry


def _print_failures(console: Console, result: BenchResult) -> None:
    records = _all_records(result.runs)
    for kind, count in metrics.failures(records).items():
        message = next(record.message or "" for record in records if record.failure == kind)
        line = f"FAILED {count} of {len(records)} requests: {kind}: {message[:200]}"
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    if result.workload.left_out:
        console.print(f"{result.workload.left_out} requests over --max-total-tokens were left out", style="yellow")


def _rates_table(summary: dict[str, dict[str, float] | None], runs: int) -> Table:
    table = _table(f"{result_title(summary)}{_of_runs(runs)}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = {
        "offered, req/s": "offered_rps",
        "carried, req/s": "carried_rps",
        "output, tok/s": "output_tps",
        "input + output, tok/s": "total_tps",
        "tokens a chunk": "tokens_per_chunk",
        "prompt tokens cached, share": "cached_share",
        "in SLO, share": "in_slo_share",
        "in SLO, req/s": "in_slo_rps",
        "answers cut short": "cut_short",
        "client CPU, share of one core": "client_cpu_share",
    }
    for title, key in rows.items():
        if (spread := summary.get(key)) is not None:
            table.add_row(title, _spread_text(spread))
    return table


def result_title(summary: dict[str, dict[str, float] | None]) -> str:
    """How many requests in how long."""
    requests, failed, duration = summary["requests"], summary["failed"], summary["duration_s"]
    assert requests is not None
    assert failed is not None
    assert duration is not None
    return f"{requests['median']:.0f} requests, {failed['median']:.0f} failed, {duration['median']:.1f} s"


def _latency_table(title: str, summary: dict[str, dict[str, float] | None]) -> Table:
    table = _table(title)
    table.add_column("", no_wrap=True)
    for stat in _STATS:
        table.add_column(stat, justify="right")
    for name, text in _LATENCIES.items():
        cells = [summary.get(f"{name}_ms_{stat}") for stat in _STATS]
        if any(cell is not None for cell in cells):
            table.add_row(text, *(_short(cell["median"]) if cell else "-" for cell in cells))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)


def _short(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.2f}"


def _spread_text(spread: dict[str, float]) -> str:
    text = f"{spread['median']:,.2f}"
    return text if spread["min"] == spread["max"] else f"{text} ({spread['min']:,.2f} to {spread['max']:,.2f})"


def _of_runs(runs: int) -> str:
    return "" if runs == 1 else f", medians of {runs} runs"


def _all_records(runs: Sequence[MeasuredRun]) -> list[RequestRecord]:
    return [record for run in runs for record in run.run.records]
