"""How leases and epochs end at the decode end. Used by the handlers of `decode_protocol` and `decode_chunks` only.

The rules here carry invariants I1 and I2: blocks go back only when no unpack into them can run, and every end is
reported to the router once, and to the peer unless it knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kv_transfer.decode_state import DecodeState, Lease, LeasePhase, RecvLink, RecvStage
from kv_transfer.events import AttemptKey, DecodeAction, DestroyEpoch, ReleaseLease, ReportFailed, SendMessage
from kv_transfer.messages import Abort, DecodeMessage


@dataclass(slots=True)
class Turn:
    """One step in the making: handlers replace `state` and append to `actions`."""

    state: DecodeState
    actions: list[DecodeAction] = field(default_factory=list)

    def act(self, action: DecodeAction) -> None:
        self.actions.append(action)

    def tell(self, peer: str, message: DecodeMessage) -> None:
        """Say it to the peer if it is connected."""
        epoch = self.state.link(peer).epoch
        if epoch is not None:
            self.act(SendMessage(peer, epoch, message))


def fail(turn: Turn, lease: Lease, code: str, reason: str) -> None:
    """End a live lease that nobody else has ended: tell the peer and the router."""
    tell_abort(turn, lease, code)
    report(turn, lease.key, code, reason)
    drain(turn, lease)


def report(turn: Turn, key: AttemptKey, code: str, reason: str) -> None:
    turn.act(ReportFailed(key, code, reason))


def tell_abort(turn: Turn, lease: Lease, reason: str) -> None:
    """A lease without blocks has no name yet, so the peer cannot have heard of it."""
    if lease.name is not None:
        turn.tell(lease.peer, Abort(lease.name, reason))


def drain(turn: Turn, lease: Lease) -> None:
    """Give the lease's blocks back as soon as the engine has answered and no unpack writes to them."""
    turn.state = turn.state.with_lease(replace(lease, phase=LeasePhase.DRAINING))
    settle(turn, lease.lease)


def settle(turn: Turn, number: int) -> None:
    lease = turn.state.leases.get(number)
    if lease is None or lease.phase is not LeasePhase.DRAINING or lease.name is None:
        return
    if not unpack_in_flight(turn.state, lease):
        turn.state = turn.state.without_lease(lease)
        turn.act(ReleaseLease(lease.key, lease.name))


def unpack_in_flight(state: DecodeState, lease: Lease) -> bool:
    link = state.link(lease.peer)
    unpacking = any(f.stage is RecvStage.UNPACKING and f.chunk.lease == lease.name for f in link.flights)
    return unpacking or link.slots.pinned(lease.lease)


def lose(turn: Turn, peer: str, reason: str) -> None:
    """Tear the live epoch down: its slots are quarantined, the peer's leases fail, its unpacks pin them."""
    link = turn.state.link(peer)
    if link.epoch is None:
        return
    turn.act(DestroyEpoch(peer, link.epoch, reason))
    pins = tuple({f.chunk.lease.lease: None for f in link.flights if f.stage is RecvStage.UNPACKING})
    slots = link.slots.lose_epoch(link.epoch, tuple(f.slot for f in link.flights if f.slot >= 0), pins)
    turn.state = turn.state.with_link(peer, RecvLink(slots=slots))
    for lease in turn.state.leases_of(peer):
        if lease.phase is not LeasePhase.DRAINING:
            fail(turn, lease, "peer_lost", reason)
