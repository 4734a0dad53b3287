"""The verdict of a chaos run as a table for people and as JSON."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from baton.chaos.faults import Injection
from baton.chaos.load import Stream
from baton.chaos.result import Result

MAX_LINES = 20
NO_FAULT = "before any fault"


@dataclass(slots=True)
class Row:
    """One kind of fault. Requests count for the latest fault before their end. Seconds are the longest of its kind."""

    injected: int = 0
    lost: int = 0
    wrong: int = 0
    near_ties: int = 0
    stall_s: float = 0.0
    whole_s: float = 0.0
    never_whole: int = 0


def rows(result: Result) -> dict[str, Row]:
    """By label, in the order in which they were first injected."""
    table: dict[str, Row] = defaultdict(Row)
    for injection in result.faults:
        row = table[injection.label]
        row.injected += 1
        row.stall_s = max(row.stall_s, longest_stall_s(result.streams, injection))
        if injection.whole_after_s is None:
            row.never_whole += 1
        else:
            row.whole_s = max(row.whole_s, injection.whole_after_s)
    for index, stream in enumerate(result.streams):
        name = _blamed(result.faults, stream)
        table[name].lost += index in result.lost
        table[name].wrong += index in result.wrong
        table[name].near_ties += result.near_ties.get(index, 0)
    return dict(table)


def longest_stall_s(streams: list[Stream], injection: Injection) -> float:
    """The longest wait of a client for its next token, its first included, that the fault can have caused."""
    return max((_stall_s(stream, injection) for stream in streams), default=0.0)


def _stall_s(stream: Stream, injection: Injection) -> float:
    """Waits that began before the fault's end and went on after its beginning, counted from its beginning."""
    times = [stream.started_at, *stream.arrivals]
    waits = ((max(before, injection.at), after) for before, after in pairwise(times) if before <= injection.until)
    return max((after - before for before, after in waits), default=0.0)


def _blamed(faults: list[Injection], stream: Stream) -> str:
    before = [injection for injection in faults if injection.at <= stream.ended_at]
    return max(before, key=lambda injection: injection.at).label if before else NO_FAULT


def print_report(console: Console, result: Result) -> None:
    table = Table(
        title="What the faults did",
        caption="requests lost, with wrong tokens; near-ties; longest stall of a stream; "
        "seconds until the cluster was whole, and how often it was not in time",
    )
    table.add_column("fault", no_wrap=True)
    for name in ("done", "lost", "wrong", "ties", "stall s", "whole s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in rows(result).items():
        whole = f"{row.whole_s:.1f}" + (f", {row.never_whole} not" if row.never_whole else "")
        counts = (row.injected, row.lost, row.wrong, row.near_ties)
        table.add_row(name, *map(str, counts), *((f"{row.stall_s:.2f}", whole) if row.injected else "--"))
    console.print(table)
    console.print(
        f"{len(result.streams)} requests ({_kinds(result.streams)}), {result.num_tokens} tokens "
        f"in {result.load_s:.0f} s: "
        f"{len(result.lost)} lost, {len(result.wrong)} wrong, {sum(result.near_ties.values())} near-ties; "
        f"at rest after {result.at_rest_s:.1f} s, {result.blocks_leaked} blocks leaked, "
        f"{result.processes_left} processes left",
        highlight=False,
    )
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(result.attempts.items()))
    paths = ", ".join(f"{count} {path}" for path, count in sorted(result.paths.items()))
    console.print(
        f"paths: {paths}; attempts: {outcomes}; {result.fenced_frames} frames of ended attempts were fenced; "
        f"log-probabilities within {result.max_logprob_error:.1e}",
        highlight=False,
    )
    for kind, lines in (("lost", result.lost.values()), ("wrong", result.wrong.values()), ("", result.problems)):
        for line in list(lines)[:MAX_LINES]:
            console.print(f"{kind}: {line}" if kind else line, markup=False, highlight=False)
    console.print("all invariants held" if result.is_good else "VIOLATED", style="green" if result.is_good else "red")


def _kinds(streams: list[Stream]) -> str:
    jobs = [stream.job for stream in streams]
    counts = {
        "sampled": sum(job.temperature > 0 for job in jobs),
        "ended by a stop string": sum(stream.finish_reason == "stop" for stream in streams),
        "with logprobs": sum(job.logprobs for job in jobs),
        "cancelled": sum(stream.cancelled for stream in streams),
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def as_dict(result: Result) -> dict[str, object]:
    table = {
        name: {field: getattr(row, field) for field in Row.__dataclass_fields__} for name, row in rows(result).items()
    }
    return {
        "ok": result.is_good,
        "requests": len(result.streams),
        "of_which": _kinds(result.streams),
        "tokens": result.num_tokens,
        "load_s": round(result.load_s, 3),
        "at_rest_s": round(result.at_rest_s, 3),
        "blocks_leaked": result.blocks_leaked,
        "processes_left": result.processes_left,
        "near_ties": sum(result.near_ties.values()),
        "max_logprob_error": result.max_logprob_error,
        "paths": result.paths,
        "attempts": result.attempts,
        "fenced_frames": result.fenced_frames,
        "faults": table,
        "lost": list(result.lost.values()),
        "wrong": list(result.wrong.values()),
        "problems": result.problems,
    }
