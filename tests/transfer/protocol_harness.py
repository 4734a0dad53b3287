"""A protocol end under test: feeds events, keeps the state and the actions of the last event."""

from __future__ import annotations

from typing import TypeVar

from kv_transfer.events import (
    AttemptKey,
    BlocksReserved,
    DecodeAction,
    DecodeEvent,
    FromDecode,
    FromPrefill,
    OpenRequested,
    Packed,
    PeerConnected,
    PrefillAction,
    PrefillDone,
    PrefillEvent,
    PrefillRequested,
    Received,
    SegmentReady,
    SendDone,
    SendMessage,
    Unpacked,
)
from kv_transfer.messages import Chunk, DecodeMessage, LeaseKey, PrefillMessage, Segment
from kv_transfer.protocol import DecodeState, PrefillState, decode_step, prefill_step

A = AttemptKey("a", 0)
B = AttemptKey("b", 0)
PEER = "peer"
EPOCH = "e1"
LEASE_A = LeaseKey(1, 7)
LEASE_B = LeaseKey(2, 8)
DEADLINE = 100.0
NUM_LAYERS = 2

T = TypeVar("T")


def segment(block: int, layers: tuple[int, int] = (0, NUM_LAYERS)) -> Segment:
    return Segment(*layers, block, block + 1)


def of_type(kind: type[T], actions: tuple[object, ...]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


class PrefillEnd:
    def __init__(self, window: int = 2, connect: bool = True) -> None:
        self.state = PrefillState.initial()
        self.actions: tuple[PrefillAction, ...] = ()
        self.history: list[PrefillAction] = []
        if connect:
            self.feed(PeerConnected(PEER, EPOCH, window))

    def feed(self, event: PrefillEvent) -> tuple[PrefillAction, ...]:
        self.state, self.actions = prefill_step(self.state, event)
        self.history.extend(self.actions)
        return self.actions

    def begin(self, key: AttemptKey = A, lease: LeaseKey = LEASE_A, deadline: float = DEADLINE) -> None:
        self.feed(PrefillRequested(key, PEER, lease, 0, deadline))

    def ready(self, block: int, key: AttemptKey = A) -> tuple[PrefillAction, ...]:
        return self.feed(SegmentReady(key, segment(block), 64))

    def packed(self, seq: int) -> tuple[PrefillAction, ...]:
        return self.feed(Packed(PEER, EPOCH, seq, (seq,)))

    def sent(self, seq: int) -> tuple[PrefillAction, ...]:
        return self.feed(SendDone(PEER, EPOCH, seq))

    def done(self, key: AttemptKey = A, ended: bool = False) -> tuple[PrefillAction, ...]:
        return self.feed(PrefillDone(key, 32, 5, ended))

    def hears(self, message: DecodeMessage, epoch: str = EPOCH) -> tuple[PrefillAction, ...]:
        return self.feed(FromDecode(PEER, epoch, message))

    def said(self) -> list[object]:
        return [action.message for action in of_type(SendMessage, self.actions)]


class DecodeEnd:
    def __init__(self, window: int = 2, connect: bool = True) -> None:
        self.state = DecodeState.initial(num_layers=NUM_LAYERS)
        self.actions: tuple[DecodeAction, ...] = ()
        self.history: list[DecodeAction] = []
        if connect:
            self.feed(PeerConnected(PEER, EPOCH, window))

    def feed(self, event: DecodeEvent) -> tuple[DecodeAction, ...]:
        self.state, self.actions = decode_step(self.state, event)
        self.history.extend(self.actions)
        return self.actions

    def open(self, key: AttemptKey = A, deadline: float = DEADLINE) -> tuple[DecodeAction, ...]:
        return self.feed(OpenRequested(key, PEER, 32, deadline))

    def reserve(self, name: LeaseKey = LEASE_A, first_block: int = 0, num_blocks: int = 2) -> tuple[DecodeAction, ...]:
        return self.feed(BlocksReserved(name.lease, name.generation, first_block, num_blocks))

    def lease(self, key: AttemptKey = A, name: LeaseKey = LEASE_A, first_block: int = 0) -> None:
        self.open(key)
        self.reserve(name, first_block)

    def hears(self, message: PrefillMessage, epoch: str = EPOCH) -> tuple[DecodeAction, ...]:
        return self.feed(FromPrefill(PEER, epoch, message))

    def chunk(self, seq: int, block: int, name: LeaseKey = LEASE_A, epoch: str = EPOCH) -> tuple[DecodeAction, ...]:
        return self.hears(Chunk(seq, name, segment(block), 64, (seq,)), epoch)

    def received(self, seq: int) -> tuple[DecodeAction, ...]:
        return self.feed(Received(PEER, EPOCH, seq))

    def unpacked(self, seq: int, ok: bool = True) -> tuple[DecodeAction, ...]:
        return self.feed(Unpacked(PEER, EPOCH, seq, ok))

    def take(self, seq: int, block: int, name: LeaseKey = LEASE_A) -> None:
        self.chunk(seq, block, name)
        self.received(seq)
        self.unpacked(seq)

    def said(self) -> list[object]:
        return [action.message for action in of_type(SendMessage, self.actions)]
