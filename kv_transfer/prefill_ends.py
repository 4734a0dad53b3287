"""How attempts and epochs end at the prefill end. Used by the handlers of `prefill_protocol` and `prefill_chunks` only.

The rules here carry invariants I1 and I2: blocks go back only when no pack can read them any more, and every end is
reported to the router once, and to the peer unless it knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kv_transfer.events import (
    AbortPrefill,
    AttemptKey,
    DestroyEpoch,
    PrefillAction,
    ReleasePrefill,
    ReportFailed,
    SendMessage,
)
from kv_transfer.messages import Abort, PrefillMessage
from kv_transfer.prefill_state import Attempt, Link, Phase, PrefillState, Stage


@dataclass(slots=True)
class Turn:
    """One step in the making: handlers replace `state` and append to `actions`."""

    state: PrefillState
    actions: list[PrefillAction] = field(default_factory=list)

    def act(self, action: PrefillAction) -> None:
        self.actions.append(action)

    def tell(self, peer: str, message: PrefillMessage) -> None:
        """Say it to the peer if it is connected."""
        epoch = self.state.link(peer).epoch
        if epoch is not None:
            self.act(SendMessage(peer, epoch, message))


def refuse(turn: Turn, key: AttemptKey, code: str, reason: str) -> None:
    """Answer a command that is not taken on. The key is remembered, so that a repeat is not answered again."""
    turn.state = turn.state.without_attempt(key)
    turn.act(ReportFailed(key, code, reason))


def end(turn: Turn, attempt: Attempt, code: str, reason: str) -> None:
    """End a live attempt without a commit. The caller tells the peer if it has to know."""
    report(turn, attempt.key, code, reason)
    if attempt.in_engine:
        turn.act(AbortPrefill(attempt.key))
    drain(turn, attempt.key)


def report(turn: Turn, key: AttemptKey, code: str, reason: str) -> None:
    turn.act(ReportFailed(key, code, reason))


def tell_abort(turn: Turn, attempt: Attempt, reason: str) -> None:
    turn.tell(attempt.peer, Abort(attempt.lease, reason))


def drain(turn: Turn, key: AttemptKey) -> None:
    """Drop what is queued of the attempt and release its blocks as soon as no pack reads them."""
    attempt = turn.state.attempts[key]
    link = turn.state.link(attempt.peer)
    queue = tuple(queued for queued in link.queue if queued.key != key)
    turn.state = turn.state.with_link(attempt.peer, replace(link, queue=queue))
    turn.state = turn.state.with_attempt(replace(attempt, phase=Phase.DRAINING, in_engine=False))
    settle(turn, key)


def settle(turn: Turn, key: AttemptKey) -> None:
    attempt = turn.state.attempts.get(key)
    if attempt is not None and attempt.phase is Phase.DRAINING and not pack_in_flight(turn.state, attempt):
        turn.state = turn.state.without_attempt(key)
        turn.act(ReleasePrefill(key))


def pack_in_flight(state: PrefillState, attempt: Attempt) -> bool:
    link = state.link(attempt.peer)
    packing = any(f.queued.key == attempt.key and f.stage is Stage.PACKING for f in link.flights)
    return packing or link.slots.pinned(attempt.key)


def lose(turn: Turn, peer: str, reason: str) -> None:
    """Tear the live epoch down: its slots are quarantined, its attempts fail, their packs pin them."""
    link = turn.state.link(peer)
    if link.epoch is None:
        return
    turn.act(DestroyEpoch(peer, link.epoch, reason))
    pins = tuple({f.queued.key: None for f in link.flights if f.stage is Stage.PACKING})
    slots = link.slots.lose_epoch(link.epoch, tuple(f.slot for f in link.flights), pins)
    turn.state = turn.state.with_link(peer, Link(slots=slots))
    for attempt in turn.state.attempts_of(peer):
        if attempt.phase is not Phase.DRAINING:
            end(turn, attempt, "peer_lost", reason)
