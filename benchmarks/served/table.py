"""A result of `baton bench served` as Markdown. Pure."""

from __future__ import annotations

from typing import Any

_COLUMNS = {
    "TTFT": "ttft_ms",
    "first to second": "second_token_ms",
    "TPOT": "tpot_ms",
    "ITL": "itl_ms",
}
_PARTS = {
    "queued": "part_queued",
    "reserve": "part_reserve",
    "prefill queue": "part_prefill_queue",
    "prefill": "part_prefill_compute",
    "delivery": "part_delivery",
    "sent after prefill": "sent_after_prefill",
    "commit to second token": "second_after_commit",
}


def markdown(document: dict[str, Any]) -> str:
    """What clients saw, what the peer did, where the time went, how long the start took."""
    rows = document["rows"]
    lines = ["What clients saw, p50 / p99 in ms:", "", *clients_table(rows)]
    if any(row["load"]["peer"] for row in rows):
        lines += ["", f"Beside {document['plan']['peer'] or 'the peer'}, ours / theirs:", "", *_peers(rows)]
    lines += ["", "Where the server says the time went, p50 / p99 in ms:", "", *_parts(rows)]
    for name, stages in document["starts"].items():
        lines += ["", f"Start of {name}: " + ", ".join(f"{stage} {_seconds(at)} s" for stage, at in stages.items())]
    lines += ["", *(f"Not run: {entry['what']}: {entry['reason'].splitlines()[0]}" for entry in document["not_run"])]
    return "\n".join(lines).rstrip() + "\n"


def clients_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the first table: latencies and throughput of some rows."""
    lines = _head(["layout", "load", "requests", *_COLUMNS, "output tok/s"])
    for row in rows:
        summary = row["summary"]
        failed = f" ({summary['failed']} failed)" if summary["failed"] else ""
        pairs = [_pair(summary, key) for key in _COLUMNS.values()]
        invalid = " INVALID" if row["invalid"] else ""
        lines.append(
            _line([row["layout"], row["load"]["name"] + invalid, f"{row['requests']}{failed}", *pairs, _tps(summary)])
        )
    return lines


def _peers(rows: list[dict[str, Any]]) -> list[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row["load"]["peer"]))
    lines = _head(["layout", "load", *(key.replace("_ms_", " ") for key in keys)])
    for row in rows:
        peer = row["load"]["peer"]
        if peer:
            cells = [_ratio(row["summary"].get(key), peer.get(key)) for key in keys]
            lines.append(_line([row["layout"], row["load"]["name"], *cells]))
    return lines


def _parts(rows: list[dict[str, Any]]) -> list[str]:
    lines = _head(["layout", "load", "paths", *_PARTS])
    for row in rows:
        paths = ", ".join(f"{count} {path}" for path, count in row["server"]["paths"].items())
        pairs = [_pair(row["server"], f"{key}_ms") for key in _PARTS.values()]
        lines.append(_line([row["layout"], row["load"]["name"], paths, *pairs]))
    return lines


def _head(names: list[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pair(summary: dict[str, Any], key: str) -> str:
    low, high = summary.get(f"{key}_p50"), summary.get(f"{key}_p99")
    return "-" if low is None or high is None else f"{_short(low)} / {_short(high)}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return "-" if ours is None or theirs is None else f"{_short(ours)} / {_short(theirs)} = {ours / theirs:.2f}"


def _tps(summary: dict[str, Any]) -> str:
    return "-" if summary["output_tps"] is None else f"{summary['output_tps']:,.0f}"


def _seconds(times: list[float]) -> str:
    return "/".join(f"{at:.1f}" for at in times)


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"
