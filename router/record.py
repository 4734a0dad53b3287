"""What is known about one request, while it runs and afterwards: path, attempts, lifecycle events, where the time went.

The dispatcher writes a record, `GET /v1/requests/{id}` reads it. Router times are whole microseconds since the request
was received, so that the parts of the time to the first token sum to it exactly. No text or token is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from baton.common import events
from baton.common.clock import Clock
from baton.common.events import Timeline
from router.policy import Decision

ROUTER = "router"


@dataclass(slots=True)
class AttemptRecord:
    """One try. `outcome` is "running", "finished", or the code and message with which it ended."""

    number: int
    decision: Decision
    outcome: str = "running"

    def as_dict(self) -> dict[str, object]:
        return {
            "attempt": self.number,
            "path": self.decision.path,
            "reason": self.decision.reason,
            "predicted_local_s": self.decision.predicted.local_s,
            "predicted_remote_s": self.decision.predicted.remote_s,
            "worker": self.decision.worker,
            "prefill_worker": self.decision.prefill_worker,
            "outcome": self.outcome,
        }

    @property
    def prefilled_by(self) -> str:
        return self.decision.prefill_worker or self.decision.worker


@dataclass(slots=True)
class RequestRecord:
    """`received_at` is on `clock`. `first_attempt`: the attempt whose token came first."""

    request_id: str
    num_prompt_tokens: int
    clock: Clock
    received_at: float
    timeline: Timeline = field(default_factory=Timeline)
    attempts: list[AttemptRecord] = field(default_factory=list)
    num_output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    first_attempt: AttemptRecord | None = None

    def mark(self, name: str) -> None:
        """Stamp a router event of the current attempt (0: before any) with the time since receipt."""
        number = self.attempts[-1].number if self.attempts else 0
        self.timeline.add(ROUTER, number, name, round((self.clock.now() - self.received_at) * 1e6) / 1e6)

    def begin_attempt(self, number: int, decision: Decision) -> AttemptRecord:
        self.attempts.append(AttemptRecord(number, decision))
        self.mark(events.DISPATCHED)
        return self.attempts[-1]

    def count_tokens(self, count: int) -> None:
        """Called for every group of tokens that goes to the client."""
        if self.num_output_tokens == 0:
            self.first_attempt = self.attempts[-1]
            self.mark(events.FIRST_TOKEN)
        if self.num_output_tokens < 2 <= self.num_output_tokens + count:
            self.mark(events.SECOND_TOKEN)
        self.num_output_tokens += count

    @property
    def decision(self) -> Decision | None:
        """That of the attempt which delivered the first token, else of the latest one."""
        attempt = self.first_attempt or (self.attempts[-1] if self.attempts else None)
        return attempt.decision if attempt else None

    def router_us(self, name: str) -> int | None:
        """When the router saw `name` for the first time, in microseconds since receipt."""
        for event in self.timeline.events:
            if event.source == ROUTER and event.name == name:
                return round(event.at_s * 1e6)
        return None

    def parts_us(self) -> dict[str, int] | None:
        """Where the time to the first token went; None before it. The values sum to the time to the first token.

        queued: in the router, before the first dispatch. retries: attempts that failed before a token came.
        reserve: decode taking blocks. prefill_queue, prefill_compute: as the worker measured. delivery: the rest.
        """
        ttft, attempt = self.router_us(events.FIRST_TOKEN), self.first_attempt
        if ttft is None or attempt is None:
            return None
        queued = self.router_us(events.DISPATCHED) or 0
        dispatched = self._at_us(ROUTER, attempt.number, events.DISPATCHED) or queued
        parts = {"queued": queued, "retries": dispatched - queued}
        worker = attempt.prefilled_by
        spans = {
            "reserve": (ROUTER, events.OPENED, events.RESERVED),
            "prefill_queue": (worker, events.ACCEPTED, events.PREFILL_START),
            "prefill_compute": (worker, events.PREFILL_START, events.PREFILL_END),
        }
        for name, (source, start, end) in spans.items():
            left = ttft - sum(parts.values())
            parts[name] = min(self._span_us(source, attempt.number, start, end) or 0, left)
        return parts | {"delivery": ttft - sum(parts.values())}

    def transfer_us(self) -> int | None:
        """How long the KV hand-over took as its sender saw it; it overlaps with the prefill."""
        for attempt in reversed(self.attempts):
            for source in (attempt.decision.prefill_worker, attempt.decision.worker):
                if source and attempt.decision.prefill_worker:
                    span = self._span_us(source, attempt.number, events.TRANSFER_START, events.TRANSFER_END)
                    if span is not None:
                        return span
        return None

    def _span_us(self, source: str, attempt: int, start: str, end: str) -> int | None:
        began = 0 if start == events.ACCEPTED else self._at_us(source, attempt, start)
        ended = self._at_us(source, attempt, end)
        return None if began is None or ended is None else max(ended - began, 0)

    def _at_us(self, source: str, attempt: int, name: str) -> int | None:
        at_s = self.timeline.at(source, attempt, name)
        return None if at_s is None else round(at_s * 1e6)

    def as_dict(self) -> dict[str, object]:
        decision = self.decision
        return {
            "id": self.request_id,
            "object": "request",
            "path": decision.path if decision else None,
            "reason": decision.reason if decision else None,
            "predicted_local_s": decision.predicted.local_s if decision else None,
            "predicted_remote_s": decision.predicted.remote_s if decision else None,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "finish_reason": self.finish_reason,
            "error": self.error,
            "attempts": [attempt.as_dict() for attempt in self.attempts],
            "ttft_us": self.router_us(events.FIRST_TOKEN),
            "ttft_parts_us": self.parts_us(),
            "transfer_us": self.transfer_us(),
            "second_token_us": self.router_us(events.SECOND_TOKEN),
            "last_token_us": self.router_us(events.LAST_TOKEN),
            "events": [
                {"source": event.source, "attempt": event.attempt, "name": event.name, "at_s": event.at_s}
                for event in self.timeline.events
            ],
        }


class RecentRequests:
    """The records of running requests and of the last `limit` ended ones. Workers' late events still find theirs."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: dict[str, RequestRecord] = {}
        self._ended: OrderedDict[str, RequestRecord] = OrderedDict()

    def begin(self, record: RequestRecord) -> None:
        self._running[record.request_id] = record

    def end(self, record: RequestRecord) -> None:
        self._running.pop(record.request_id, None)
        self._ended[record.request_id] = record
        while len(self._ended) > self._limit:
            self._ended.popitem(last=False)

    def get(self, request_id: str) -> RequestRecord | None:
        return self._running.get(request_id) or self._ended.get(request_id)

    def group(self, group_id: str) -> list[RequestRecord]:
        """The records of an API request with several prompts, in their order."""
        records: list[RequestRecord] = []
        while (record := self.get(f"{group_id}-{len(records)}")) is not None:
            records.append(record)
        return records

    def add_worker_event(self, request_id: str, worker_id: str, attempt: int, name: str, at_s: float) -> None:
        """Record what a worker reported; unknown requests, and names that no worker has, are dropped."""
        record = self.get(request_id)
        if record is not None and name in events.WORKER_EVENTS and any(a.number == attempt for a in record.attempts):
            record.timeline.add(worker_id, attempt, name, at_s)
