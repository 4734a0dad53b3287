"""What happens at the prefill end of a hand-over (events), and what it asks its surroundings to do (actions)."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.link_events import AttemptKey, CommonAction, CommonEvent
from kv_transfer.messages import DecodeMessage, LeaseKey, Segment

# ---- events


@dataclass(frozen=True, slots=True)
class PrefillRequested:
    """The router hands over an attempt with its lease. Blocks [0, first_block) are already at the peer."""

    key: AttemptKey
    peer: str
    lease: LeaseKey
    first_block: int
    deadline: float


@dataclass(frozen=True, slots=True)
class SegmentReady:
    """The KV of a segment is written (its event has fired) and may be packed."""

    key: AttemptKey
    segment: Segment
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The first token is sampled; every segment was announced before. `ended`: the request stops at this token."""

    key: AttemptKey
    num_tokens: int
    first_token: int
    ended: bool


@dataclass(frozen=True, slots=True)
class PrefillFailed:
    """The engine refused or dropped the prefill. Blocks that it had stay held until ReleasePrefill."""

    key: AttemptKey
    reason: str


@dataclass(frozen=True, slots=True)
class Packed:
    """The segment of `seq` lies in its send slot.

    `written_at`: when its KV was computed, by this process' monotonic clock. For measurements; the protocol ignores it.
    """

    peer: str
    epoch: str
    seq: int
    fingerprints: tuple[int, ...]
    written_at: float | None = None


@dataclass(frozen=True, slots=True)
class SendDone:
    """The transport has finished reading the send slot of `seq`."""

    peer: str
    epoch: str
    seq: int


@dataclass(frozen=True, slots=True)
class FromDecode:
    peer: str
    epoch: str
    message: DecodeMessage


# ---- actions


@dataclass(frozen=True, slots=True)
class StartPrefill:
    key: AttemptKey


@dataclass(frozen=True, slots=True)
class AbortPrefill:
    """Take the attempt out of the engine's queue or batch. Its blocks stay held until ReleasePrefill."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class ReleasePrefill:
    """No pack of this attempt can run any more: give its blocks back (full ones stay as prefix cache)."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Pack:
    """Gather the segment into send slot `slot` and compute its fingerprints."""

    peer: str
    epoch: str
    seq: int
    slot: int
    key: AttemptKey
    lease: LeaseKey
    segment: Segment


@dataclass(frozen=True, slots=True)
class StartSend:
    """Launch the send of slot `slot`. Emitted in the order of seq, right after its Chunk message."""

    peer: str
    epoch: str
    seq: int
    slot: int
    num_bytes: int


PrefillEvent = (
    CommonEvent | PrefillRequested | SegmentReady | PrefillDone | PrefillFailed | Packed | SendDone | FromDecode
)
PrefillAction = CommonAction | StartPrefill | AbortPrefill | ReleasePrefill | Pack | StartSend
