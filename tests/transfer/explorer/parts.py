"""The components that a model world is made of: immutable values, interned by the search."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from kv_transfer.events import AttemptKey, DecodeEvent
from kv_transfer.messages import DecodeMessage, LeaseKey, PrefillMessage, Segment


class Violation(Exception):
    """An invariant does not hold. The text says which."""


class Phase(IntEnum):
    IDLE = 0
    OPENING = 1
    PREFILLING = 2
    OK = 3
    FAILED = 4
    CANCELLED = 5
    ABSENT = 6  # belongs to another part of a world that has come apart


class Side(IntEnum):
    GONE = 0
    CLOSING = 1
    UP = 2


# ---- router


class RouterRequest(NamedTuple):
    """What the router knows of one request; nothing that it does for one depends on another.

    `base`: tokens emitted before the current attempt; `emitted`: tokens that the client has. `broken`: whether the
    stream to its prefill and to its decode worker is, which a crash breaks until the router attaches anew.
    """

    phase: Phase = Phase.IDLE
    attempt: int = 0
    base: int = 0
    emitted: int = 0
    broken: tuple[bool, bool] = (False, False)


class OpenCommand(NamedTuple):
    key: AttemptKey
    base: int


class PrefillCommand(NamedTuple):
    key: AttemptKey
    base: int
    lease: LeaseKey
    first_block: int


class CancelCommand(NamedTuple):
    key: AttemptKey


Command = OpenCommand | PrefillCommand | CancelCommand


class Budget(NamedTuple):
    """Faults left, and whether a message was lost or overtaken between workers, or from the router.

    `plan`: the faults, in order, that are still to hit workers with several links: (kind, worker). See plans.py.
    """

    left: int
    plan: tuple[tuple[str, str], ...] = ()
    peer_lossy: bool = False
    router_lossy: bool = False


# ---- workers


class PrefillWork(NamedTuple):
    """An attempt in the prefill engine. `stage`: segments emitted. `holds`: it has its blocks."""

    key: AttemptKey
    base: int
    stage: int = 0
    holds: bool = False
    computing: bool = True


class PrefillEngine(NamedTuple):
    """`reported`, `released`: what was said and given back. `deadlines`: of the first command of each attempt."""

    incarnation: int
    free: int
    work: tuple[PrefillWork, ...] = ()
    reported: tuple[AttemptKey, ...] = ()
    released: tuple[AttemptKey, ...] = ()
    deadlines: tuple[tuple[AttemptKey, float], ...] = ()


class Reserved(NamedTuple):
    """Blocks of a lease: `blocks[i]` is the physical block of logical block first_block + i."""

    lease: int
    generation: int
    key: AttemptKey
    base: int
    first_block: int
    blocks: tuple[int, ...]


class Running(NamedTuple):
    key: AttemptKey
    position: int
    blocks: tuple[int, ...]


Content = tuple[str, int] | None  # whose data a physical block holds: (request, logical block)


class DecodeEngine(NamedTuple):
    """`stamp` gives generations and never repeats over incarnations. `deadlines`: of the first open of each attempt.

    `elsewhere`: blocks that another part of a world that has come apart holds, see slices.py.
    """

    incarnation: int
    stamp: int
    free: tuple[int, ...]
    contents: tuple[Content, ...]
    reserved: tuple[Reserved, ...] = ()
    running: tuple[Running, ...] = ()
    replies: tuple[tuple[AttemptKey, DecodeEvent], ...] = ()
    reported: tuple[AttemptKey, ...] = ()
    admitted: tuple[tuple[AttemptKey, LeaseKey], ...] = ()
    deadlines: tuple[tuple[AttemptKey, float], ...] = ()
    elsewhere: tuple[int, ...] = ()


# ---- between a prefill and a decode worker


class Tag(NamedTuple):
    """What staged bytes are: whose KV they hold and the name under which they were fingerprinted."""

    request: str
    lease: LeaseKey
    segment: Segment


class PackJob(NamedTuple):
    seq: int
    slot: int
    key: AttemptKey
    lease: LeaseKey
    segment: Segment


class SendJob(NamedTuple):
    """`moved`: the bytes have left, SendDone is due."""

    seq: int
    slot: int
    tag: Tag
    moved: bool = False


class RecvJob(NamedTuple):
    """`tag`: the bytes that have arrived, Received is due."""

    seq: int
    slot: int
    tag: Tag | None = None


class UnpackJob(NamedTuple):
    seq: int
    slot: int
    lease: LeaseKey
    segment: Segment
    block: int
    tag: Tag


class PrefillEpoch(NamedTuple):
    """Prefill's side of one connection. `peer`: how the other side stands. `packed`: slots that wait for StartSend."""

    number: int
    side: Side = Side.UP
    peer: Side = Side.UP
    inbound: tuple[DecodeMessage, ...] = ()
    packs: tuple[PackJob, ...] = ()
    packed: tuple[SendJob, ...] = ()
    sends: tuple[SendJob, ...] = ()
    next_send: int = 0


class DecodeEpoch(NamedTuple):
    """Decode's side of one connection. `offers`: bytes of launched sends that no receive has met yet."""

    number: int
    side: Side = Side.UP
    peer: Side = Side.UP
    inbound: tuple[PrefillMessage, ...] = ()
    offers: tuple[Tag, ...] = ()
    recvs: tuple[RecvJob, ...] = ()
    unpacks: tuple[UnpackJob, ...] = ()
    next_recv: int = 0


class PrefillHalf(NamedTuple):
    """All connections of a pair that prefill's side knows. `made`: how many there were."""

    made: int
    epochs: tuple[PrefillEpoch, ...]


class DecodeHalf(NamedTuple):
    epochs: tuple[DecodeEpoch, ...]


Epoch = PrefillEpoch | DecodeEpoch
Half = PrefillHalf | DecodeHalf
