"""Names of the lifecycle events of a request, and the timeline that collects them.

Workers stamp events with seconds since they accepted the attempt (protos/worker.proto, AttemptEvent); the router stamps
its own with seconds since it received the request. No two machines' clocks are ever compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

# ---- router
RECEIVED: Final = "received"  # the request is parsed; zero of the router's clock
QUEUED: Final = "queued"  # it waits for room in the router, or in a worker's engine
DISPATCHED: Final = "dispatched"  # the path is decided and the first command is sent
OPENED: Final = "opened"  # Open is sent to the decode worker
RESERVED: Final = "reserved"  # blocks are taken on the decode worker
PREFILL_SENT: Final = "prefill_sent"  # Prefill (or Generate) is sent
ATTEMPT_ENDED: Final = "attempt_ended"  # an attempt ended without finishing the request

# ---- workers
ACCEPTED: Final = "accepted"  # zero of the worker's clock for this attempt
PREFILL_START: Final = "prefill_start"  # the first step that computes prompt tokens begins
PREFILL_END: Final = "prefill_end"  # the last prompt token is computed and the first token is sampled
TRANSFER_START: Final = "transfer_start"  # the first chunk is packed (prefill) or its receive is posted (decode)
TRANSFER_END: Final = "transfer_end"  # the last chunk is sent (prefill) or verified (decode)
COMMITTED: Final = "committed"  # the hand-over is complete at this end
ADMITTED: Final = "admitted"  # the decode engine takes the request over

# ---- both
FIRST_TOKEN: Final = "first_token"
SECOND_TOKEN: Final = "second_token"
LAST_TOKEN: Final = "last_token"
FINISHED: Final = "finished"
CANCELLED: Final = "cancelled"
FAILED: Final = "failed"

WORKER_EVENTS: Final = frozenset(
    {
        ACCEPTED,
        QUEUED,
        RESERVED,
        PREFILL_START,
        PREFILL_END,
        TRANSFER_START,
        TRANSFER_END,
        COMMITTED,
        ADMITTED,
        FIRST_TOKEN,
        SECOND_TOKEN,
        LAST_TOKEN,
        FINISHED,
        CANCELLED,
        FAILED,
    }
)


@dataclass(frozen=True, slots=True)
class Event:
    """`source` is "router" or a worker's id; `at_s` counts from that source's own zero for this attempt."""

    source: str
    attempt: int
    name: str
    at_s: float


@dataclass(slots=True)
class Timeline:
    """Events in the order in which they became known. The first occurrence of a (source, attempt, name) counts."""

    events: list[Event] = field(default_factory=list)

    def add(self, source: str, attempt: int, name: str, at_s: float) -> None:
        """Record an event once; a repetition is ignored."""
        if self.at(source, attempt, name) is None:
            self.events.append(Event(source, attempt, name, at_s))

    def at(self, source: str, attempt: int, name: str) -> float | None:
        """Seconds on the source's own clock, or None if it never happened."""
        for event in self.events:
            if event.name == name and event.source == source and event.attempt == attempt:
                return event.at_s
        return None
