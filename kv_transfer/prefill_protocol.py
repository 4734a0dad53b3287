"""The prefill end of the hand-over as a pure state machine: `prefill_step(state, event) -> (state, actions)`.

Called by the coordinator on the worker's asyncio thread, which executes the actions in order. Promises to the engine: a
block of an attempt is given back (ReleasePrefill) only when no pack of it runs or will run. Promises to the router: one
terminal report per attempt at most. Promises to the peer: Chunk messages in order of seq, never more than `window` of
them unacknowledged, and word of every end that the peer does not know of already.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from kv_transfer import prefill_chunks as chunks
from kv_transfer import prefill_ends as ends
from kv_transfer.events import (
    AbortPrefill,
    AttemptKey,
    Cancel,
    EpochDestroyed,
    FromDecode,
    Packed,
    PeerConnected,
    PeerLost,
    PrefillAction,
    PrefillDone,
    PrefillEvent,
    PrefillFailed,
    PrefillRequested,
    SegmentReady,
    SendDone,
    StartPrefill,
    Tick,
)
from kv_transfer.messages import Abort, ChunksDone, Committed, LeaseKey
from kv_transfer.prefill_ends import Turn
from kv_transfer.prefill_state import Attempt, Link, Phase, PrefillState

__all__ = ["PrefillState", "prefill_step"]


def prefill_step(state: PrefillState, event: PrefillEvent) -> tuple[PrefillState, tuple[PrefillAction, ...]]:
    turn = Turn(state)
    handle(turn, event)
    return turn.state, tuple(turn.actions)


def handle(turn: Turn, event: PrefillEvent) -> None:
    match event:
        case SegmentReady():
            chunks.on_segment(turn, event)
        case Packed():
            chunks.on_packed(turn, event)
        case SendDone():
            chunks.on_send_done(turn, event)
        case FromDecode():
            on_message(turn, event)
        case PrefillRequested():
            on_requested(turn, event)
        case PrefillDone():
            chunks.on_done(turn, event)
        case PrefillFailed():
            on_failed(turn, event)
        case Cancel():
            on_cancel(turn, event.key)
        case Tick():
            on_tick(turn, event.now)
        case PeerConnected():
            on_connected(turn, event)
        case PeerLost():
            on_lost(turn, event)
        case EpochDestroyed():
            on_destroyed(turn, event)
        case _:
            assert_never(event)


# ---- attempts


def on_requested(turn: Turn, event: PrefillRequested) -> None:
    if event.key in turn.state.attempts or event.key in turn.state.ended:
        return
    if turn.state.link(event.peer).epoch is None:
        ends.refuse(turn, event.key, "no_connection", f"no connection to {event.peer}")
    elif event.deadline <= turn.state.now:
        turn.tell(event.peer, Abort(event.lease, "expired"))
        ends.refuse(turn, event.key, "expired", "the deadline passed before the prefill began")
    else:
        turn.state = turn.state.with_attempt(Attempt(event.key, event.peer, event.lease, event.deadline))
        turn.act(StartPrefill(event.key))


def on_committed(turn: Turn, peer: str, lease: LeaseKey) -> None:
    attempt = turn.state.attempt_of_lease(peer, lease)
    if attempt is not None and attempt.phase is Phase.COMMITTING:
        ends.drain(turn, attempt.key)


def on_failed(turn: Turn, event: PrefillFailed) -> None:
    attempt = turn.state.attempts.get(event.key)
    if attempt is not None and attempt.phase is not Phase.DRAINING:
        ends.tell_abort(turn, attempt, event.reason)
        ends.end(turn, replace(attempt, in_engine=False), "internal", event.reason)


def on_cancel(turn: Turn, key: AttemptKey) -> None:
    attempt = turn.state.attempts.get(key)
    if attempt is None or attempt.phase is Phase.DRAINING:
        return
    ends.tell_abort(turn, attempt, "cancelled")
    if attempt.in_engine:
        turn.act(AbortPrefill(key))
    ends.drain(turn, key)


def on_message(turn: Turn, event: FromDecode) -> None:
    if turn.state.link(event.peer).epoch != event.epoch:
        return
    match event.message:
        case ChunksDone(through):
            chunks.on_chunks_done(turn, event.peer, through)
        case Committed(lease):
            on_committed(turn, event.peer, lease)
        case Abort(lease, reason):
            on_peer_abort(turn, event.peer, lease, reason)
        case _:
            assert_never(event.message)


def on_peer_abort(turn: Turn, peer: str, lease: LeaseKey, reason: str) -> None:
    attempt = turn.state.attempt_of_lease(peer, lease)
    if attempt is not None and attempt.phase is not Phase.DRAINING:
        ends.end(turn, attempt, "aborted", f"decode: {reason}")


def on_tick(turn: Turn, now: float) -> None:
    turn.state = replace(turn.state, now=max(now, turn.state.now))
    for attempt in turn.state.attempts.values():
        if attempt.phase is not Phase.DRAINING and attempt.deadline <= turn.state.now:
            ends.tell_abort(turn, attempt, "expired")
            ends.end(turn, attempt, "expired", "the deadline passed during the hand-over")
    for peer in turn.state.links:
        watch_progress(turn, peer)


def watch_progress(turn: Turn, peer: str) -> None:
    """Tear the epoch down when a chunk is outstanding and nothing has moved for `stall_timeout`."""
    link = turn.state.link(peer)
    if link.epoch is None or not link.outstanding:
        return
    if link.stall_at is None:
        turn.state = turn.state.with_link(peer, replace(link, stall_at=turn.state.now + turn.state.stall_timeout))
    elif link.stall_at <= turn.state.now:
        ends.lose(turn, peer, "stalled: no chunk moved")


# ---- epochs


def on_connected(turn: Turn, event: PeerConnected) -> None:
    link = turn.state.link(event.peer)
    if link.epoch == event.epoch or link.slots.is_dying(event.epoch):
        return
    if link.epoch is not None:
        ends.lose(turn, event.peer, f"replaced by epoch {event.epoch}")
    slots = turn.state.link(event.peer).slots.open_epoch(event.window)
    turn.state = turn.state.with_link(event.peer, Link(epoch=event.epoch, slots=slots))


def on_lost(turn: Turn, event: PeerLost) -> None:
    if turn.state.link(event.peer).epoch == event.epoch:
        ends.lose(turn, event.peer, event.reason)


def on_destroyed(turn: Turn, event: EpochDestroyed) -> None:
    link = turn.state.link(event.peer)
    pins = link.slots.pins(event.epoch)
    turn.state = turn.state.with_link(event.peer, replace(link, slots=link.slots.destroyed(event.epoch)))
    for key in pins:
        ends.settle(turn, key)
    chunks.pump(turn, event.peer)
