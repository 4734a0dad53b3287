"""What the decode end of the hand-over knows: immutable records, read and rebuilt by `decode_protocol.decode_step`.

No torch, no I/O, no clock. All times are seconds of the worker's monotonic clock as events carried them.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import IntEnum
from typing import NamedTuple

from kv_transfer.coverage import NOTHING, Coverage, add
from kv_transfer.frozen_map import FrozenMap, FrozenTable
from kv_transfer.link_events import AttemptKey
from kv_transfer.link_state import NO_LINK, STALL_TIMEOUT_S, Link
from kv_transfer.messages import Chunk, Commit, LeaseKey, Segment


class LeasePhase(IntEnum):
    """OPENING: the engine is asked for blocks. RESERVED: it has them.

    DRAINING: the lease has ended, but the engine's answer or an unpack into its blocks is still to come.
    """

    OPENING = 0
    RESERVED = 1
    DRAINING = 2


class RecvStage(IntEnum):
    """Where an announced chunk stands. WAITING: no slot is free yet, its predecessors' epoch is still quarantined.

    RECEIVING: its receive is asked for; it ends with `Received`, which workers feed in the same turn.
    """

    WAITING = 0
    RECEIVING = 1
    UNPACKING = 2
    DONE = 3


class RecvFlight(NamedTuple):
    """An announced chunk whose credit has not been returned. It holds `slot` while RECEIVING or UNPACKING, else -1."""

    chunk: Chunk
    slot: int = -1
    stage: RecvStage = RecvStage.WAITING

    @property
    def pin(self) -> int | None:
        return self.chunk.lease.lease if self.stage is RecvStage.UNPACKING else None


class Lease(NamedTuple):
    """A reservation of logical blocks [first_block, num_blocks), to be filled by `peer`.

    `name` is what the peer calls it, None until the engine has given blocks. `num_received`, `covered`: the segments
    that were verified and scattered, by number and by what they cover.
    """

    lease: int
    key: AttemptKey
    peer: str
    num_tokens: int
    deadline: float
    phase: LeasePhase = LeasePhase.OPENING
    name: LeaseKey | None = None
    first_block: int = 0
    num_blocks: int = 0
    num_received: int = 0
    covered: Coverage = NOTHING
    commit: Commit | None = None

    def received(self, segment: Segment) -> Lease:
        """With one segment more, that was wanted. Called for every chunk: a third of `_replace`."""
        return Lease(
            self.lease,
            self.key,
            self.peer,
            self.num_tokens,
            self.deadline,
            self.phase,
            self.name,
            self.first_block,
            self.num_blocks,
            self.num_received + 1,
            add(self.covered, segment),
            self.commit,
        )

    @property
    def alias(self) -> AttemptKey:
        return self.key

    @property
    def is_over(self) -> bool:
        return self.phase is LeasePhase.DRAINING


RecvLink = Link[RecvFlight, int]  # flights are the chunks [done_through, next_seq) without gaps


class DecodeState(NamedTuple):
    """Everything the decode end remembers. `ended`: the latest attempts that are over, so that repeats are no-ops."""

    num_layers: int
    stall_timeout: float
    now: float = 0.0
    next_lease: int = 1
    links: FrozenMap[str, RecvLink] = FrozenMap()
    leases: FrozenTable[int, Lease] = FrozenTable()
    aliases: FrozenTable[Hashable, int] = FrozenTable()
    ended: tuple[AttemptKey, ...] = ()

    @staticmethod
    def initial(num_layers: int, stall_timeout: float = STALL_TIMEOUT_S) -> DecodeState:
        return DecodeState(num_layers=num_layers, stall_timeout=stall_timeout)

    @property
    def holders(self) -> FrozenTable[int, Lease]:
        return self.leases

    def link(self, peer: str) -> RecvLink:
        return self.links.get(peer) or NO_LINK

    def leases_of(self, peer: str) -> tuple[Lease, ...]:
        return tuple(lease for lease in self.leases.values() if lease.peer == peer)
