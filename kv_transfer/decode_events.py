"""What happens at the decode end of a hand-over (events), and what it asks its surroundings to do (actions)."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.link_events import AttemptKey, CommonAction, CommonEvent
from kv_transfer.messages import LeaseKey, PrefillMessage, Segment

# ---- events


@dataclass(frozen=True, slots=True)
class OpenRequested:
    """The router asks for a reservation for a prompt of `num_tokens`, to be filled by `peer` before `deadline`."""

    key: AttemptKey
    peer: str
    num_tokens: int
    deadline: float


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """The engine has taken blocks for the lease: logical blocks [first_block, num_blocks) are to be received."""

    lease: int
    generation: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class BlocksRefused:
    lease: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Received:
    """What is asked of the slot of `seq` from now on happens when its bytes lie there.

    Told in the turn that asks for the receive: links launch what follows behind it. For the machine a receive takes no
    time, so the slot of a chunk that nobody wants is free again before its bytes have come: it is neither in flight nor
    quarantined, and no counter shows it. What keeps its memory from another epoch is `StagingPool.hold` (I1); within
    the epoch the wire keeps the order.
    """

    peer: str
    epoch: str
    seq: int


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The receive slot of `seq` was verified and, if `ok`, scattered into the lease's blocks."""

    peer: str
    epoch: str
    seq: int
    ok: bool


@dataclass(frozen=True, slots=True)
class FromPrefill:
    peer: str
    epoch: str
    message: PrefillMessage


# ---- actions


@dataclass(frozen=True, slots=True)
class ReserveBlocks:
    """Ask the engine for blocks; answered by BlocksReserved or BlocksRefused."""

    key: AttemptKey
    lease: int


@dataclass(frozen=True, slots=True)
class ReportReserved:
    key: AttemptKey
    lease: LeaseKey
    first_block: int


@dataclass(frozen=True, slots=True)
class ReportRefused:
    key: AttemptKey
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class StartRecv:
    """Launch the receive of `seq` into receive slot `slot`. Emitted in the order of seq."""

    peer: str
    epoch: str
    seq: int
    slot: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Unpack:
    """Verify slot `slot` against the fingerprints and scatter it into the lease's blocks."""

    peer: str
    epoch: str
    seq: int
    slot: int
    lease: LeaseKey
    segment: Segment
    fingerprints: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Admit:
    """The lease's KV is complete and verified: its blocks become the running request's."""

    key: AttemptKey
    lease: LeaseKey
    num_tokens: int
    first_token: int


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """No unpack into the lease's blocks can run any more: give them back."""

    key: AttemptKey
    lease: LeaseKey


DecodeEvent = CommonEvent | OpenRequested | BlocksReserved | BlocksRefused | Received | Unpacked | FromPrefill
DecodeAction = CommonAction | ReserveBlocks | ReportReserved | ReportRefused | StartRecv | Unpack | Admit | ReleaseLease
