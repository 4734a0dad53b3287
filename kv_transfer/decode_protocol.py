"""The decode end of the hand-over as a pure state machine: `decode_step(state, event) -> (state, actions)`.

Called by the coordinator on the worker's asyncio thread, which executes the actions in order. Promises to the engine: a
lease is admitted only when all of its KV is verified (I5), and released only when no unpack into it can run (I1).
Promises to the router: one answer to an open, and at most one failure after a reservation (I2). Promises to the peer:
receives in order of seq, credits returned in order, an Abort for every lease that ended without a commit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from kv_transfer import decode_chunks as chunks
from kv_transfer import decode_ends as ends
from kv_transfer.decode_ends import Turn
from kv_transfer.decode_state import DecodeState, Lease, LeasePhase, RecvLink
from kv_transfer.events import (
    AttemptKey,
    BlocksRefused,
    BlocksReserved,
    Cancel,
    DecodeAction,
    DecodeEvent,
    EpochDestroyed,
    FromPrefill,
    OpenRequested,
    PeerConnected,
    PeerLost,
    Received,
    ReportRefused,
    ReportReserved,
    ReserveBlocks,
    Tick,
    Unpacked,
)
from kv_transfer.messages import Abort, Chunk, Commit, Finish, LeaseKey

__all__ = ["DecodeState", "decode_step"]


def decode_step(state: DecodeState, event: DecodeEvent) -> tuple[DecodeState, tuple[DecodeAction, ...]]:
    turn = Turn(state)
    handle(turn, event)
    return turn.state, tuple(turn.actions)


def handle(turn: Turn, event: DecodeEvent) -> None:
    match event:
        case Received():
            chunks.on_received(turn, event)
        case Unpacked():
            chunks.on_unpacked(turn, event)
        case FromPrefill():
            on_message(turn, event)
        case OpenRequested():
            on_open(turn, event)
        case BlocksReserved():
            on_reserved(turn, event)
        case BlocksRefused():
            on_refused(turn, event)
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


# ---- leases


def on_open(turn: Turn, event: OpenRequested) -> None:
    if turn.state.lease_of_attempt(event.key) is not None or event.key in turn.state.ended:
        return
    number = turn.state.next_lease
    lease = Lease(number, event.key, event.peer, event.num_tokens, event.deadline)
    turn.state = replace(turn.state, next_lease=number + 1)
    if turn.state.link(event.peer).epoch is None:
        refuse(turn, lease, "no_connection", f"no connection to {event.peer}")
    elif event.deadline <= turn.state.now:
        refuse(turn, lease, "expired", "the deadline passed before the reservation")
    else:
        turn.state = turn.state.with_lease(lease)
        turn.act(ReserveBlocks(event.key, number))


def refuse(turn: Turn, lease: Lease, code: str, reason: str) -> None:
    turn.state = turn.state.without_lease(lease)
    turn.act(ReportRefused(lease.key, code, reason))


def on_reserved(turn: Turn, event: BlocksReserved) -> None:
    lease = turn.state.leases.get(event.lease)
    if lease is None or lease.generation is not None:
        return
    name = LeaseKey(event.lease, event.generation)
    lease = replace(lease, generation=event.generation, first_block=event.first_block, num_blocks=event.num_blocks)
    if lease.phase is LeasePhase.DRAINING:
        ends.drain(turn, lease)
    else:
        turn.state = turn.state.with_lease(replace(lease, phase=LeasePhase.RESERVED))
        turn.act(ReportReserved(lease.key, name, event.first_block))


def on_refused(turn: Turn, event: BlocksRefused) -> None:
    lease = turn.state.leases.get(event.lease)
    if lease is None or lease.generation is not None:
        return
    if lease.phase is LeasePhase.DRAINING:
        turn.state = turn.state.without_lease(lease)
    else:
        refuse(turn, lease, event.code, event.reason)


def on_cancel(turn: Turn, key: AttemptKey) -> None:
    lease = turn.state.lease_of_attempt(key)
    if lease is not None and lease.phase is not LeasePhase.DRAINING:
        ends.tell_abort(turn, lease, "cancelled")
        ends.drain(turn, lease)


def on_message(turn: Turn, event: FromPrefill) -> None:
    if turn.state.link(event.peer).epoch != event.epoch:
        return
    match event.message:
        case Chunk():
            chunks.on_chunk(turn, event.peer, event.message)
        case Commit():
            chunks.on_commit(turn, event.peer, event.message)
        case Finish(name):
            on_finish(turn, event.peer, name)
        case Abort(name, reason):
            on_abort(turn, event.peer, name, reason)
        case _:
            assert_never(event.message)


def on_finish(turn: Turn, peer: str, name: LeaseKey) -> None:
    """The request ended at its first token: the router hears that from prefill."""
    lease = turn.state.live_lease(peer, name)
    if lease is not None:
        ends.drain(turn, lease)


def on_abort(turn: Turn, peer: str, name: LeaseKey, reason: str) -> None:
    lease = turn.state.live_lease(peer, name)
    if lease is not None:
        ends.report(turn, lease.key, "aborted", f"prefill: {reason}")
        ends.drain(turn, lease)


# ---- time


def on_tick(turn: Turn, now: float) -> None:
    turn.state = replace(turn.state, now=max(now, turn.state.now))
    for lease in turn.state.leases.values():
        if lease.phase is not LeasePhase.DRAINING and lease.deadline <= turn.state.now:
            ends.fail(turn, lease, "expired", "the deadline passed during the hand-over")
    for peer in turn.state.links:
        watch_progress(turn, peer)


def watch_progress(turn: Turn, peer: str) -> None:
    """Tear the epoch down when a chunk is in flight and nothing has moved for `stall_timeout`."""
    link = turn.state.link(peer)
    if link.epoch is None or not link.flights:
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
    turn.state = turn.state.with_link(event.peer, RecvLink(epoch=event.epoch, slots=slots))


def on_lost(turn: Turn, event: PeerLost) -> None:
    if turn.state.link(event.peer).epoch == event.epoch:
        ends.lose(turn, event.peer, event.reason)


def on_destroyed(turn: Turn, event: EpochDestroyed) -> None:
    link = turn.state.link(event.peer)
    pins = link.slots.pins(event.epoch)
    turn.state = turn.state.with_link(event.peer, replace(link, slots=link.slots.destroyed(event.epoch)))
    for lease in pins:
        ends.settle(turn, lease)
    chunks.start_recvs(turn, event.peer)
