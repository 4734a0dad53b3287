"""How attempts end at the prefill end. Used by the handlers of `prefill_protocol` and `prefill_chunks` only.

The rules here carry invariants I1 and I2: blocks go back only when no pack can read them any more, and every end is
reported to the router once, and to the peer unless it knows.
"""

from __future__ import annotations

from kv_transfer import link_protocol
from kv_transfer.link_events import AttemptKey
from kv_transfer.messages import Abort, PrefillMessage
from kv_transfer.prefill_events import AbortPrefill, PrefillAction, ReleasePrefill
from kv_transfer.prefill_state import Attempt, Flight, Phase, PrefillState


class Turn(link_protocol.Turn[AttemptKey, Flight, Attempt, PrefillAction, PrefillMessage]):
    """One step of the prefill end in the making."""

    __slots__ = ("waiting",)

    def __init__(self, state: PrefillState) -> None:
        self.stall_timeout, self.now, self.links, self.holders, self.aliases, self.waiting, self.ended = state
        self.actions = []

    def result(self) -> PrefillState:
        return PrefillState(
            self.stall_timeout, self.now, self.links, self.holders, self.aliases, self.waiting, self.ended
        )

    def fail(self, holder: Attempt, code: str, reason: str) -> None:
        tell_abort(self, holder, code)
        end(self, holder, code, reason)

    def settle(self, name: AttemptKey) -> None:
        settle(self, name)

    def change(self, attempt: Attempt) -> None:
        self.put(attempt.key, attempt)

    def unqueue(self, attempt: Attempt) -> None:
        """Its queue is empty or dropped."""
        left = tuple(key for key in self.waiting.get(attempt.peer) or () if key != attempt.key)
        self.put_waiting(attempt.peer, left)

    def put_waiting(self, peer: str, keys: tuple[AttemptKey, ...]) -> None:
        self.waiting = self.waiting.set(peer, keys) if keys else self.waiting.discard(peer)


def refuse(turn: Turn, attempt: Attempt, code: str, reason: str) -> None:
    """Answer a command that is not taken on. The key is remembered, so that a repeat is not answered again."""
    turn.forget(attempt.key, attempt)
    turn.report(attempt.key, code, reason)


def end(turn: Turn, attempt: Attempt, code: str, reason: str) -> None:
    """End a live attempt without a commit. The caller tells the peer if it has to know."""
    turn.report(attempt.key, code, reason)
    if attempt.in_engine:
        turn.act(AbortPrefill(attempt.key))
    drain(turn, attempt)


def tell_abort(turn: Turn, attempt: Attempt, reason: str) -> None:
    turn.tell(attempt.peer, Abort(attempt.lease, reason))


def drain(turn: Turn, attempt: Attempt) -> None:
    """Drop what is queued of the attempt and release its blocks as soon as no pack reads them."""
    if attempt.queue:
        turn.unqueue(attempt)
    turn.change(attempt._replace(phase=Phase.DRAINING, in_engine=False, queue=()))
    settle(turn, attempt.key)


def settle(turn: Turn, key: AttemptKey) -> None:
    attempt = turn.holders.get(key)
    if attempt is not None and attempt.phase is Phase.DRAINING and not pack_in_flight(turn, attempt):
        turn.forget(key, attempt)
        turn.act(ReleasePrefill(key))


def pack_in_flight(turn: Turn, attempt: Attempt) -> bool:
    link = turn.link(attempt.peer)
    return any(flight.pin == attempt.key for flight in link.flights) or link.slots.pinned(attempt.key)
