"""What happens to a hand-over (events) and what it asks its surroundings to do (actions).

`protocol.py` is pure: `(state, event) -> (state, actions)`. The sender and the receiver turn what happens in the world
into these events and execute the actions. Times are seconds of one monotonic clock and arrive inside events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kv_transfer.messages import DecodeMessage, LeaseKey, PrefillMessage, Segment


class AttemptKey(NamedTuple):
    """One try at one request, as the router names it."""

    request_id: str
    attempt: int


# ---- events of both ends


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """The pair's process group is up under `epoch`; `window` chunks may be in flight."""

    peer: str
    epoch: str
    window: int


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The control stream of `epoch` ended, fell silent, or a transfer of it failed."""

    peer: str
    epoch: str
    reason: str


@dataclass(frozen=True, slots=True)
class EpochDestroyed:
    """The process group of `epoch` is gone and its transfer thread has ended.

    No pack, send, receive or unpack of it runs or will start: nothing of it can touch staging or KV blocks any more.
    """

    peer: str
    epoch: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """The router withdraws an attempt. Unknown and ended attempts are a no-op."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; deadlines at or before `now` fall due. Sent by the reaper's own timer, due or not."""

    now: float


# ---- events of the prefill end


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


# ---- events of the decode end


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
    """The bytes of `seq` lie in its receive slot."""

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


CommonEvent = PeerConnected | PeerLost | EpochDestroyed | Cancel | Tick
PrefillEvent = (
    CommonEvent | PrefillRequested | SegmentReady | PrefillDone | PrefillFailed | Packed | SendDone | FromDecode
)
DecodeEvent = CommonEvent | OpenRequested | BlocksReserved | BlocksRefused | Received | Unpacked | FromPrefill


# ---- actions of both ends


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Write a frame to the peer's control stream of `epoch`; drop it if that stream is gone."""

    peer: str
    epoch: str
    message: PrefillMessage | DecodeMessage


@dataclass(frozen=True, slots=True)
class DestroyEpoch:
    """Close the control stream and the process group of `epoch`, then report EpochDestroyed."""

    peer: str
    epoch: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReportFailed:
    """Tell the router that the attempt has ended here without finishing."""

    key: AttemptKey
    code: str
    reason: str


# ---- actions of the prefill end


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


PrefillAction = (
    SendMessage | DestroyEpoch | ReportFailed | StartPrefill | AbortPrefill | ReleasePrefill | Pack | StartSend
)


# ---- actions of the decode end


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


DecodeAction = (
    SendMessage
    | DestroyEpoch
    | ReportFailed
    | ReserveBlocks
    | ReportReserved
    | ReportRefused
    | StartRecv
    | Unpack
    | Admit
    | ReleaseLease
)
