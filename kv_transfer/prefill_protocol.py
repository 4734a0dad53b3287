"""The prefill end of the hand-over as a pure state machine: `prefill_step(state, event) -> (state, actions)`.

Called by the coordinator on the worker's asyncio thread, which executes the actions in order. Promises to the engine: a
block of an attempt is given back (ReleasePrefill) only when no pack of it runs or will run. Promises to the router: one
terminal report per attempt at most. Promises to the peer: Chunk messages in order of seq, never more than `window` of
them unacknowledged, and word of every end that the peer does not know of already.
"""

from __future__ import annotations

from typing import assert_never

from kv_transfer import link_protocol as links
from kv_transfer import prefill_chunks as chunks
from kv_transfer import prefill_ends as ends
from kv_transfer.link_events import AttemptKey, Cancel, EpochDestroyed, PeerConnected, PeerLost, Tick
from kv_transfer.messages import Abort, ChunksDone, Committed, LeaseKey
from kv_transfer.prefill_ends import Turn
from kv_transfer.prefill_events import (
    AbortPrefill,
    FromDecode,
    Packed,
    PrefillAction,
    PrefillDone,
    PrefillEvent,
    PrefillFailed,
    PrefillRequested,
    SegmentReady,
    SendDone,
    StartPrefill,
)
from kv_transfer.prefill_state import Attempt, Phase, PrefillState

__all__ = ["PrefillState", "prefill_step"]


def prefill_step(state: PrefillState, event: PrefillEvent) -> tuple[PrefillState, tuple[PrefillAction, ...]]:
    turn = Turn(state)
    handle(turn, event)
    return turn.result(), tuple(turn.actions)


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
            links.on_tick(turn, event.now)
        case PeerConnected():
            links.on_connected(turn, event)
        case PeerLost():
            links.on_lost(turn, event)
        case EpochDestroyed():
            links.on_destroyed(turn, event)
            chunks.pump(turn, event.peer, turn.link(event.peer))
        case _:
            assert_never(event)


def on_requested(turn: Turn, event: PrefillRequested) -> None:
    if event.key in turn.holders or event.key in turn.ended:
        return
    attempt = Attempt(event.key, event.peer, event.lease, event.deadline)
    if turn.link(event.peer).epoch is None:
        ends.refuse(turn, attempt, "no_connection", f"no connection to {event.peer}")
    elif event.deadline <= turn.now:
        turn.tell(event.peer, Abort(event.lease, "expired"))
        ends.refuse(turn, attempt, "expired", "the deadline passed before the prefill began")
    else:
        turn.begin(event.key, attempt)
        turn.act(StartPrefill(event.key))


def on_failed(turn: Turn, event: PrefillFailed) -> None:
    attempt = turn.holders.get(event.key)
    if attempt is not None and attempt.phase is not Phase.DRAINING:
        ends.tell_abort(turn, attempt, event.reason)
        ends.end(turn, attempt._replace(in_engine=False), "internal", event.reason)


def on_cancel(turn: Turn, key: AttemptKey) -> None:
    attempt = turn.holders.get(key)
    if attempt is None or attempt.phase is Phase.DRAINING:
        return
    ends.tell_abort(turn, attempt, "cancelled")
    if attempt.in_engine:
        turn.act(AbortPrefill(key))
    ends.drain(turn, attempt)


# ---- from the peer


def on_message(turn: Turn, event: FromDecode) -> None:
    if turn.link(event.peer).epoch != event.epoch:
        return
    match event.message:
        case ChunksDone(through):
            chunks.on_chunks_done(turn, event.peer, through)
        case Committed(lease):
            on_committed(turn, event.peer, lease)
        case Abort(lease, reason):
            on_abort(turn, event.peer, lease, reason)
        case _:
            assert_never(event.message)


def on_committed(turn: Turn, peer: str, lease: LeaseKey) -> None:
    attempt = turn.find((peer, lease))
    if attempt is not None and attempt.phase is Phase.COMMITTING:
        ends.drain(turn, attempt)


def on_abort(turn: Turn, peer: str, lease: LeaseKey, reason: str) -> None:
    attempt = turn.find((peer, lease))
    if attempt is not None and attempt.phase is not Phase.DRAINING:
        ends.end(turn, attempt, "aborted", f"decode: {reason}")
