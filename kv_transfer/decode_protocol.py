"""The decode end of the hand-over as a pure state machine: `decode_step(state, event) -> (state, actions)`.

Called by the coordinator on the worker's asyncio thread, which executes the actions in order. Promises to the engine: a
lease is admitted only when all of its KV is verified (I5), and released only when no unpack into it can run (I1).
Promises to the router: one answer to an open, and at most one failure after a reservation (I2). Promises to the peer:
receives in order of seq, credits returned in order, an Abort for every lease that ended without a commit.
"""

from __future__ import annotations

from typing import assert_never

from kv_transfer import decode_chunks as chunks
from kv_transfer import decode_ends as ends
from kv_transfer import link_protocol as links
from kv_transfer.decode_ends import Turn
from kv_transfer.decode_events import (
    BlocksRefused,
    BlocksReserved,
    DecodeAction,
    DecodeEvent,
    FromPrefill,
    OpenRequested,
    Received,
    ReportRefused,
    ReportReserved,
    ReserveBlocks,
    Unpacked,
)
from kv_transfer.decode_state import DecodeState, Lease, LeasePhase
from kv_transfer.link_events import AttemptKey, Cancel, EpochDestroyed, PeerConnected, PeerLost, Tick
from kv_transfer.messages import Abort, Chunk, Commit, Finish, LeaseKey

__all__ = ["DecodeState", "decode_step"]


def decode_step(state: DecodeState, event: DecodeEvent) -> tuple[DecodeState, tuple[DecodeAction, ...]]:
    turn = Turn(state)
    handle(turn, event)
    return turn.result(), tuple(turn.actions)


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
            links.on_tick(turn, event.now)
        case PeerConnected():
            links.on_connected(turn, event)
        case PeerLost():
            links.on_lost(turn, event)
        case EpochDestroyed():
            links.on_destroyed(turn, event)
            chunks.start_recvs(turn, event.peer, turn.link(event.peer))
        case _:
            assert_never(event)


# ---- leases


def on_open(turn: Turn, event: OpenRequested) -> None:
    if event.key in turn.aliases or event.key in turn.ended:
        return
    number = turn.next_lease
    turn.next_lease = number + 1
    lease = Lease(number, event.key, event.peer, event.num_tokens, event.deadline)
    if turn.link(event.peer).epoch is None:
        refuse(turn, lease, "no_connection", f"no connection to {event.peer}")
    elif event.deadline <= turn.now:
        refuse(turn, lease, "expired", "the deadline passed before the reservation")
    else:
        turn.begin(number, lease)
        turn.act(ReserveBlocks(event.key, number))


def refuse(turn: Turn, lease: Lease, code: str, reason: str) -> None:
    turn.forget(lease.lease, lease)
    turn.act(ReportRefused(lease.key, code, reason))


def on_reserved(turn: Turn, event: BlocksReserved) -> None:
    lease = turn.holders.get(event.lease)
    if lease is None or lease.name is not None:
        return
    name = LeaseKey(event.lease, event.generation)
    lease = lease._replace(name=name, first_block=event.first_block, num_blocks=event.num_blocks)
    if lease.is_over:
        ends.drain(turn, lease)
    else:
        turn.change(lease._replace(phase=LeasePhase.RESERVED))
        turn.act(ReportReserved(lease.key, name, event.first_block))


def on_refused(turn: Turn, event: BlocksRefused) -> None:
    lease = turn.holders.get(event.lease)
    if lease is None or lease.name is not None:
        return
    if lease.is_over:
        turn.forget(lease.lease, lease)
    else:
        refuse(turn, lease, event.code, event.reason)


def on_cancel(turn: Turn, key: AttemptKey) -> None:
    lease = turn.find(key)
    if lease is not None and not lease.is_over:
        ends.tell_abort(turn, lease, "cancelled")
        ends.drain(turn, lease)


# ---- from the peer


def on_message(turn: Turn, event: FromPrefill) -> None:
    if turn.link(event.peer).epoch != event.epoch:
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
    lease = turn.live_lease(peer, name)
    if lease is not None:
        ends.drain(turn, lease)


def on_abort(turn: Turn, peer: str, name: LeaseKey, reason: str) -> None:
    lease = turn.live_lease(peer, name)
    if lease is not None:
        turn.report(lease.key, "aborted", f"prefill: {reason}")
        ends.drain(turn, lease)
