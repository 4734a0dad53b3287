"""What the server knows of the measured requests: `GET /v1/requests/{id}` of each, and the spans inside them.

Every span lies within one process, so no clocks are compared.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import httpx

from baton.common import events
from benchmarks.serve.metrics import describe

_AT_ONCE = 4
_ROUTER = "router"
# name: (role of the process, first event, last event)
SPANS = {
    "prefill_ran": ("prefill", events.PREFILL_START, events.PREFILL_END),
    "sent_after_prefill": ("prefill", events.PREFILL_END, events.TRANSFER_END),
    "committed_after_prefill": ("prefill", events.PREFILL_END, events.COMMITTED),
    "decode_receiving": ("decode", events.TRANSFER_START, events.TRANSFER_END),
    "admitted_after_commit": ("decode", events.COMMITTED, events.ADMITTED),
    "second_after_admission": ("decode", events.ADMITTED, events.SECOND_TOKEN),
    "second_after_commit": ("decode", events.COMMITTED, events.SECOND_TOKEN),
    "router_reserve": (_ROUTER, events.OPENED, events.RESERVED),
    "router_first_to_second": (_ROUTER, events.FIRST_TOKEN, events.SECOND_TOKEN),
}


async def fetch_timelines(url: str, request_ids: Iterable[str]) -> list[dict[str, Any]]:
    """The timelines that the server still has, in the order of the ids."""
    gate = asyncio.Semaphore(_AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:

        async def fetch(request_id: str) -> dict[str, Any] | None:
            async with gate:
                answer = await http.get(f"/v1/requests/{request_id}")
            found: dict[str, Any] | None = answer.json() if answer.status_code == 200 else None
            return found

        found = await asyncio.gather(*(fetch(request_id) for request_id in request_ids))
    return [timeline for timeline in found if timeline is not None]


async def fetch_workers(url: str) -> Any:
    """What `/v1/workers` says now."""
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
        return (await http.get("/v1/workers")).json()


def describe_timelines(timelines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Percentiles in milliseconds of the parts of the time to the first token, and of all spans; paths and reasons."""
    parts = [timeline["ttft_parts_us"] for timeline in timelines if timeline["ttft_parts_us"]]
    names = parts[0].keys() if parts else ()
    summary: dict[str, Any] = {}
    for name in names:
        summary |= describe(f"part_{name}", [part[name] / 1e6 for part in parts])
    for name, (role, start, end) in SPANS.items():
        spans = [span for timeline in timelines if (span := _span(timeline, role, start, end)) is not None]
        summary |= describe(name, spans) if spans else {}
    summary["paths"] = dict(Counter(timeline["path"] for timeline in timelines))
    summary["attempts"] = dict(Counter(len(timeline["attempts"]) for timeline in timelines))
    return summary


def _span(timeline: dict[str, Any], role: str, start: str, end: str) -> float | None:
    """Seconds between two events of the last process of a role that reported both."""
    at: dict[str, dict[str, float]] = {}
    for event in timeline["events"]:
        at.setdefault(event["source"], {})[event["name"]] = event["at_s"]
    for source, names in reversed(at.items()):
        if source.startswith(role) and start in names and end in names:
            return names[end] - names[start]
    return None
