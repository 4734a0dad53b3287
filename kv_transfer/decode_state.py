"""What the decode end of the hand-over knows: immutable records, read and rebuilt by `decode_protocol.decode_step`.

No torch, no I/O, no clock. All times are seconds of the worker's monotonic clock as events carried them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from kv_transfer.events import AttemptKey
from kv_transfer.frozen_map import FrozenMap
from kv_transfer.messages import Chunk, Commit, LeaseKey, Segment
from kv_transfer.protocol_common import ENDED_REMEMBERED, STALL_TIMEOUT_S, Counters, earliest
from kv_transfer.slots import SlotPool


class LeasePhase(IntEnum):
    """OPENING: the engine is asked for blocks. RESERVED: it has them.

    DRAINING: the lease has ended, but the engine's answer or an unpack into its blocks is still to come.
    """

    OPENING = 0
    RESERVED = 1
    DRAINING = 2


class RecvStage(IntEnum):
    """Where an announced chunk stands. WAITING: no slot is free yet, its predecessors' epoch is still quarantined."""

    WAITING = 0
    RECEIVING = 1
    UNPACKING = 2
    DONE = 3


@dataclass(frozen=True, slots=True)
class Lease:
    """A reservation of logical blocks [first_block, num_blocks), to be filled by `peer`.

    `generation` is None until the engine has answered. `announced` counts Chunk messages of this lease; `received`
    holds the segments that were verified and scattered.
    """

    lease: int
    key: AttemptKey
    peer: str
    num_tokens: int
    deadline: float
    phase: LeasePhase = LeasePhase.OPENING
    generation: int | None = None
    first_block: int = 0
    num_blocks: int = 0
    announced: int = 0
    received: tuple[Segment, ...] = ()
    commit: Commit | None = None

    @property
    def name(self) -> LeaseKey | None:
        """What the peer calls it, once it has blocks."""
        return None if self.generation is None else LeaseKey(self.lease, self.generation)


class RecvFlight(NamedTuple):
    """An announced chunk whose credit has not been returned. It holds `slot` while RECEIVING or UNPACKING, else -1."""

    chunk: Chunk
    slot: int = -1
    stage: RecvStage = RecvStage.WAITING


@dataclass(frozen=True, slots=True)
class RecvLink:
    """The connection to one prefill peer. `flights` are the chunks [done_through, next_seq), in order, without gaps."""

    epoch: str | None = None
    slots: SlotPool[int] = SlotPool()  # noqa: RUF009 (immutable)
    done_through: int = 0
    flights: tuple[RecvFlight, ...] = ()
    stall_at: float | None = None

    @property
    def next_seq(self) -> int:
        return self.done_through + len(self.flights)


@dataclass(frozen=True, slots=True)
class DecodeState:
    """Everything the decode end remembers. `ended`: the latest attempts that are over, so that repeats are no-ops."""

    num_layers: int
    stall_timeout: float
    now: float = 0.0
    next_lease: int = 1
    links: FrozenMap[str, RecvLink] = FrozenMap()  # noqa: RUF009 (immutable)
    leases: FrozenMap[int, Lease] = FrozenMap()  # noqa: RUF009 (immutable)
    ended: tuple[AttemptKey, ...] = ()

    @staticmethod
    def initial(num_layers: int, stall_timeout: float = STALL_TIMEOUT_S) -> DecodeState:
        return DecodeState(num_layers=num_layers, stall_timeout=stall_timeout)

    def link(self, peer: str) -> RecvLink:
        return self.links.get(peer) or RecvLink()

    def with_link(self, peer: str, link: RecvLink) -> DecodeState:
        """A link that is neither connected nor waiting for an EpochDestroyed is forgotten."""
        useful = link.epoch is not None or link.slots.dying
        return replace(self, links=self.links.set(peer, link) if useful else self.links.discard(peer))

    def with_lease(self, lease: Lease) -> DecodeState:
        return replace(self, leases=self.leases.set(lease.lease, lease))

    def without_lease(self, lease: Lease) -> DecodeState:
        ended = (*self.ended, lease.key)[-ENDED_REMEMBERED:]
        return replace(self, leases=self.leases.discard(lease.lease), ended=ended)

    def leases_of(self, peer: str) -> tuple[Lease, ...]:
        return tuple(lease for lease in self.leases.values() if lease.peer == peer)

    def lease_of_attempt(self, key: AttemptKey) -> Lease | None:
        return next((lease for lease in self.leases.values() if lease.key == key), None)

    def live_lease(self, peer: str, name: LeaseKey) -> Lease | None:
        """The reserved lease that `peer` may write to under this name; None when it is unknown, ended or another's."""
        lease = self.leases.get(name.lease)
        if lease is None or lease.phase is not LeasePhase.RESERVED or lease.peer != peer or lease.name != name:
            return None
        return lease

    def counters(self) -> Counters:
        links = self.links.values()
        in_flight = sum(flight.slot >= 0 for link in links for flight in link.flights)
        return Counters(len(self.leases), in_flight, sum(link.slots.num_quarantined for link in links))

    def next_deadline(self) -> float | None:
        """When the next Tick is due at the latest, or None while nothing waits."""
        leases = (lease.deadline for lease in self.leases.values() if lease.phase is not LeasePhase.DRAINING)
        latest = self.now + self.stall_timeout
        stalls = (link.stall_at or latest for link in self.links.values() if link.flights)
        return earliest((*leases, *stalls))
