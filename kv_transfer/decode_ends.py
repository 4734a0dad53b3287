"""How leases end at the decode end. Used by the handlers of `decode_protocol` and `decode_chunks` only.

The rules here carry invariants I1 and I2: blocks go back only when no unpack into them can run, and every end is
reported to the router once, and to the peer unless it knows.
"""

from __future__ import annotations

from kv_transfer import link_protocol
from kv_transfer.decode_events import DecodeAction, ReleaseLease
from kv_transfer.decode_state import DecodeState, Lease, LeasePhase, RecvFlight
from kv_transfer.messages import Abort, DecodeMessage, LeaseKey


class Turn(link_protocol.Turn[int, RecvFlight, Lease, DecodeAction, DecodeMessage]):
    """One step of the decode end in the making."""

    __slots__ = ("next_lease", "num_layers")

    def __init__(self, state: DecodeState) -> None:
        (
            self.num_layers,
            self.stall_timeout,
            self.now,
            self.next_lease,
            self.links,
            self.holders,
            self.aliases,
            self.ended,
        ) = state
        self.actions = []

    def result(self) -> DecodeState:
        return DecodeState(
            self.num_layers,
            self.stall_timeout,
            self.now,
            self.next_lease,
            self.links,
            self.holders,
            self.aliases,
            self.ended,
        )

    def fail(self, holder: Lease, code: str, reason: str) -> None:
        fail(self, holder, code, reason)

    def settle(self, name: int) -> None:
        settle(self, name)

    def change(self, lease: Lease) -> None:
        self.put(lease.lease, lease)

    def live_lease(self, peer: str, name: LeaseKey) -> Lease | None:
        """The reserved lease that `peer` may write to under this name; None when it is unknown, ended or another's."""
        lease = self.holders.get(name.lease)
        if lease is None or lease.phase is not LeasePhase.RESERVED or lease.peer != peer or lease.name != name:
            return None
        return lease


def fail(turn: Turn, lease: Lease, code: str, reason: str) -> None:
    """End a live lease that nobody else has ended: tell the peer and the router."""
    tell_abort(turn, lease, code)
    turn.report(lease.key, code, reason)
    drain(turn, lease)


def tell_abort(turn: Turn, lease: Lease, reason: str) -> None:
    """A lease without blocks has no name yet, so the peer cannot have heard of it."""
    if lease.name is not None:
        turn.tell(lease.peer, Abort(lease.name, reason))


def drain(turn: Turn, lease: Lease) -> None:
    """Give the lease's blocks back as soon as the engine has answered and no unpack writes to them."""
    turn.change(lease._replace(phase=LeasePhase.DRAINING))
    settle(turn, lease.lease)


def settle(turn: Turn, number: int) -> None:
    lease = turn.holders.get(number)
    if lease is None or lease.phase is not LeasePhase.DRAINING or lease.name is None:
        return
    if not unpack_in_flight(turn, lease):
        turn.forget(number, lease)
        turn.act(ReleaseLease(lease.key, lease.name))


def unpack_in_flight(turn: Turn, lease: Lease) -> bool:
    link = turn.link(lease.peer)
    return any(flight.pin == lease.lease for flight in link.flights) or link.slots.pinned(lease.lease)
