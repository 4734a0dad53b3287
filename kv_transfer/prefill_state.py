"""What the prefill end of the hand-over knows: immutable records, read and rebuilt by `prefill_protocol.prefill_step`.

No torch, no I/O, no clock. All times are seconds of the worker's monotonic clock as events carried them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from kv_transfer.events import AttemptKey
from kv_transfer.frozen_map import FrozenMap
from kv_transfer.messages import LeaseKey, Segment
from kv_transfer.protocol_common import ENDED_REMEMBERED, STALL_TIMEOUT_S, Counters, earliest
from kv_transfer.slots import SlotPool


class Phase(IntEnum):
    """STREAMING: segments come and go. COMMITTING: Commit sent. DRAINING: ended, but a pack still reads its blocks."""

    STREAMING = 0
    COMMITTING = 1
    DRAINING = 2


class Stage(IntEnum):
    """Where a chunk's send slot stands."""

    PACKING = 0
    PACKED = 1
    SENDING = 2


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What PrefillDone said."""

    num_tokens: int
    token: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Attempt:
    """One hand-over. `in_engine`: the engine still computes it. `num_chunks`: Chunk messages sent so far."""

    key: AttemptKey
    peer: str
    lease: LeaseKey
    deadline: float
    phase: Phase = Phase.STREAMING
    in_engine: bool = True
    num_chunks: int = 0
    first: FirstToken | None = None


class Queued(NamedTuple):
    """A segment that waits for a slot and a credit."""

    key: AttemptKey
    lease: LeaseKey
    segment: Segment
    num_bytes: int


class Flight(NamedTuple):
    """A chunk that holds a send slot."""

    seq: int
    slot: int
    stage: Stage
    queued: Queued
    fingerprints: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Link:
    """The connection to one decode peer. `flights` are in order of seq; window - (next_seq - done_through) credits."""

    epoch: str | None = None
    slots: SlotPool[AttemptKey] = SlotPool()  # noqa: RUF009 (immutable)
    next_seq: int = 0
    done_through: int = 0
    queue: tuple[Queued, ...] = ()
    flights: tuple[Flight, ...] = ()
    stall_at: float | None = None

    @property
    def has_room(self) -> bool:
        return bool(self.slots.free) and self.next_seq - self.done_through < self.slots.window

    @property
    def outstanding(self) -> bool:
        return self.next_seq > self.done_through or bool(self.flights)

    @property
    def sent_through(self) -> int:
        """Every chunk with seq below this has had its Chunk message."""
        return next((flight.seq for flight in self.flights if flight.stage is not Stage.SENDING), self.next_seq)


@dataclass(frozen=True, slots=True)
class PrefillState:
    """Everything the prefill end remembers. `ended`: the latest attempts that are over, so that repeats are no-ops."""

    stall_timeout: float
    now: float = 0.0
    links: FrozenMap[str, Link] = FrozenMap()  # noqa: RUF009 (immutable)
    attempts: FrozenMap[AttemptKey, Attempt] = FrozenMap()  # noqa: RUF009 (immutable)
    ended: tuple[AttemptKey, ...] = ()

    @staticmethod
    def initial(stall_timeout: float = STALL_TIMEOUT_S) -> PrefillState:
        return PrefillState(stall_timeout=stall_timeout)

    def link(self, peer: str) -> Link:
        return self.links.get(peer) or Link()

    def with_link(self, peer: str, link: Link) -> PrefillState:
        """A link that is neither connected nor waiting for an EpochDestroyed is forgotten."""
        useful = link.epoch is not None or link.slots.dying
        return replace(self, links=self.links.set(peer, link) if useful else self.links.discard(peer))

    def with_attempt(self, attempt: Attempt) -> PrefillState:
        return replace(self, attempts=self.attempts.set(attempt.key, attempt))

    def without_attempt(self, key: AttemptKey) -> PrefillState:
        return replace(self, attempts=self.attempts.discard(key), ended=(*self.ended, key)[-ENDED_REMEMBERED:])

    def attempts_of(self, peer: str) -> tuple[Attempt, ...]:
        return tuple(attempt for attempt in self.attempts.values() if attempt.peer == peer)

    def attempt_of_lease(self, peer: str, lease: LeaseKey) -> Attempt | None:
        return next((attempt for attempt in self.attempts_of(peer) if attempt.lease == lease), None)

    def counters(self) -> Counters:
        links = self.links.values()
        in_flight = sum(len(link.flights) for link in links)
        return Counters(len(self.attempts), in_flight, sum(link.slots.num_quarantined for link in links))

    def next_deadline(self) -> float | None:
        """When the next Tick is due at the latest, or None while nothing waits."""
        attempts = (attempt.deadline for attempt in self.attempts.values() if attempt.phase is not Phase.DRAINING)
        latest = self.now + self.stall_timeout
        stalls = (link.stall_at or latest for link in self.links.values() if link.epoch and link.outstanding)
        return earliest((*attempts, *stalls))
