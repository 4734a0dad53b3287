"""What the prefill end of the hand-over knows: immutable records, read and rebuilt by `prefill_protocol.prefill_step`.

No torch, no I/O, no clock. All times are seconds of the worker's monotonic clock as events carried them.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import IntEnum
from typing import NamedTuple

from kv_transfer.frozen_map import FrozenMap, FrozenTable
from kv_transfer.link_events import AttemptKey
from kv_transfer.link_state import NO_LINK, STALL_TIMEOUT_S, Link
from kv_transfer.messages import LeaseKey, Segment


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


class FirstToken(NamedTuple):
    """What PrefillDone said."""

    num_tokens: int
    token: int
    ended: bool


class Queued(NamedTuple):
    """A segment on its way: waiting for a slot and a credit, or in a slot."""

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

    @property
    def pin(self) -> AttemptKey | None:
        return self.queued.key if self.stage is Stage.PACKING else None


class Attempt(NamedTuple):
    """One hand-over. `in_engine`: the engine still computes it. `num_chunks`: segments announced by the engine.

    `queue`: those of them that wait for a slot and a credit.
    """

    key: AttemptKey
    peer: str
    lease: LeaseKey
    deadline: float
    phase: Phase = Phase.STREAMING
    in_engine: bool = True
    num_chunks: int = 0
    queue: tuple[Queued, ...] = ()
    first: FirstToken | None = None

    def announced(self, queue: tuple[Queued, ...]) -> Attempt:
        """With one segment more; `queue` is what waits now. Called for every chunk: a third of `_replace`."""
        return Attempt(
            self.key,
            self.peer,
            self.lease,
            self.deadline,
            self.phase,
            self.in_engine,
            self.num_chunks + 1,
            queue,
            self.first,
        )

    @property
    def alias(self) -> tuple[str, LeaseKey]:
        return self.peer, self.lease

    @property
    def is_over(self) -> bool:
        return self.phase is Phase.DRAINING


SendLink = Link[Flight, AttemptKey]


class PrefillState(NamedTuple):
    """Everything the prefill end remembers.

    `waiting`: per peer, the attempts with a queue, in the order in which they are served. `ended`: the latest attempts
    that are over, so that repeats are no-ops.
    """

    stall_timeout: float
    now: float = 0.0
    links: FrozenMap[str, SendLink] = FrozenMap()
    attempts: FrozenTable[AttemptKey, Attempt] = FrozenTable()
    aliases: FrozenTable[Hashable, AttemptKey] = FrozenTable()
    waiting: FrozenMap[str, tuple[AttemptKey, ...]] = FrozenMap()
    ended: tuple[AttemptKey, ...] = ()

    @staticmethod
    def initial(stall_timeout: float = STALL_TIMEOUT_S) -> PrefillState:
        return PrefillState(stall_timeout=stall_timeout)

    @property
    def holders(self) -> FrozenTable[AttemptKey, Attempt]:
        return self.attempts

    def link(self, peer: str) -> SendLink:
        return self.links.get(peer) or NO_LINK

    def attempts_of(self, peer: str) -> tuple[Attempt, ...]:
        return tuple(attempt for attempt in self.attempts.values() if attempt.peer == peer)

    def attempt_of_lease(self, peer: str, lease: LeaseKey) -> Attempt | None:
        key = self.aliases.get((peer, lease))
        return None if key is None else self.attempts[key]
