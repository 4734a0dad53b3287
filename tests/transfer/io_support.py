"""Pairs of connected transports and links inside one process, and the listening sockets of this process."""

from __future__ import annotations

import ipaddress
import os
import queue
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from baton.engine.kv_layout import KVLayout
from kv_transfer.connection import DECODE_RANK, PREFILL_RANK, connect
from kv_transfer.events import (
    AttemptKey,
    Pack,
    Packed,
    PeerLost,
    Received,
    SendDone,
    StartRecv,
    StartSend,
    Unpack,
    Unpacked,
)
from kv_transfer.messages import LeaseKey, Segment
from kv_transfer.packing import TorchPacker
from kv_transfer.receiver import RecvEvent, RecvLink
from kv_transfer.sender import SendEvent, SendLink
from kv_transfer.staging import StagingPool
from kv_transfer.transport import PairTransport

CPU = torch.device("cpu")
LAYOUT = KVLayout("model", "float32", block_size=4, num_layers=3, num_kv_heads=2, head_dim=8)
NUM_BLOCKS = 12
NUM_SLOTS = 3
WAIT_S = 20.0
EPOCH = "epoch"
ATTEMPT = AttemptKey("request", 0)


def join(
    store: Store, epoch: str, rank: int, host: str = "127.0.0.1", operation_timeout_s: float = 5.0
) -> PairTransport:
    """One end of a gloo pair; the other has to join within 10 s."""
    return connect(
        "gloo",
        store,
        epoch,
        rank,
        host=host,
        device=CPU,
        connect_timeout_s=10.0,
        operation_timeout_s=operation_timeout_s,
    )


def send(transport: PairTransport, buffer: torch.Tensor) -> None:
    transport.start_send(buffer).wait()


def recv(transport: PairTransport, buffer: torch.Tensor) -> None:
    transport.start_recv(buffer).wait()


@contextmanager
def gloo_pair(
    operation_timeout_s: float = 5.0, host: str = "127.0.0.1"
) -> Iterator[tuple[PairTransport, PairTransport]]:
    """(decode end, prefill end), both in this process."""
    store, epoch = HashStore(), uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(join, store, epoch, PREFILL_RANK, host, operation_timeout_s)
        decode = join(store, epoch, DECODE_RANK, host, operation_timeout_s)
        prefill = other.result(WAIT_S)
    try:
        yield decode, prefill
    finally:
        # At once: an end that waits is freed by the other's closing.
        closers = [threading.Thread(target=end.close) for end in (decode, prefill)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()


def staging_pool() -> StagingPool:
    return StagingPool(LAYOUT, NUM_SLOTS, LAYOUT.segment_bytes(LAYOUT.num_layers, 4), CPU)


def random_cache(seed: int) -> torch.Tensor:
    cache = LAYOUT.allocate(NUM_BLOCKS, CPU)
    return cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(seed)))


def nan_cache() -> torch.Tensor:
    return LAYOUT.allocate(NUM_BLOCKS, CPU).fill_(float("nan"))


@dataclass
class PrefillEnd:
    """A SendLink over a cache of random blocks, and the events it reported."""

    transport: PairTransport
    cache: torch.Tensor = field(default_factory=lambda: random_cache(0))
    staging: StagingPool = field(default_factory=staging_pool)
    events: queue.Queue[SendEvent] = field(default_factory=queue.Queue)
    packer: TorchPacker = field(default_factory=TorchPacker)

    def __post_init__(self) -> None:
        self.link = SendLink(self.transport, self.staging, self.packer, self.cache, self.events.put)

    def pack(self, seq: int, slot: int, segment: Segment, block_ids: list[int], lease: LeaseKey) -> Packed:
        self.link.pack(Pack("p", EPOCH, seq, slot, ATTEMPT, lease, segment), block_ids, None)
        event = self.events.get(timeout=WAIT_S)
        assert isinstance(event, Packed)
        assert event.seq == seq
        return event

    def start_send(self, seq: int, slot: int, segment: Segment) -> None:
        num_bytes = LAYOUT.segment_bytes(segment.num_layers, segment.num_blocks)
        self.link.start_send(StartSend("p", EPOCH, seq, slot, num_bytes))

    def sent(self, seq: int) -> None:
        assert self.events.get(timeout=WAIT_S) == SendDone("p", EPOCH, seq)


@dataclass
class DecodeEnd:
    """A RecvLink over a cache of NaN, and the events it reported."""

    transport: PairTransport
    cache: torch.Tensor = field(default_factory=nan_cache)
    staging: StagingPool = field(default_factory=staging_pool)
    events: queue.Queue[RecvEvent] = field(default_factory=queue.Queue)
    packer: TorchPacker = field(default_factory=TorchPacker)

    def __post_init__(self) -> None:
        self.link = RecvLink(self.transport, self.staging, self.packer, self.cache, self.events.put)

    def start_recv(self, seq: int, slot: int, segment: Segment) -> None:
        num_bytes = LAYOUT.segment_bytes(segment.num_layers, segment.num_blocks)
        self.link.start_recv(StartRecv("d", EPOCH, seq, slot, num_bytes))

    def received(self, seq: int) -> None:
        assert self.events.get(timeout=WAIT_S) == Received("d", EPOCH, seq)

    def unpack(
        self,
        seq: int,
        slot: int,
        segment: Segment,
        block_ids: list[int],
        lease: LeaseKey,
        fingerprints: tuple[int, ...],
    ) -> bool:
        self.ask_unpack(seq, slot, segment, block_ids, lease, fingerprints)
        return self.unpacked(seq)

    def ask_unpack(
        self,
        seq: int,
        slot: int,
        segment: Segment,
        block_ids: list[int],
        lease: LeaseKey,
        fingerprints: tuple[int, ...],
    ) -> None:
        self.link.unpack(Unpack("d", EPOCH, seq, slot, lease, segment, fingerprints), block_ids)

    def unpacked(self, seq: int) -> bool:
        event = self.events.get(timeout=WAIT_S)
        assert isinstance(event, Unpacked)
        assert event.seq == seq
        return event.ok


@contextmanager
def linked_pair(operation_timeout_s: float = 5.0) -> Iterator[tuple[DecodeEnd, PrefillEnd]]:
    """Two links over a gloo pair, closed at the end."""
    with gloo_pair(operation_timeout_s) as (decode, prefill):
        ends = DecodeEnd(decode), PrefillEnd(prefill)
        try:
            yield ends
        finally:
            with ThreadPoolExecutor(2) as pool:
                for closed in [pool.submit(end.link.close) for end in ends]:
                    closed.result(WAIT_S)


def lost(events: queue.Queue[SendEvent] | queue.Queue[RecvEvent], timeout_s: float = WAIT_S) -> PeerLost:
    event = events.get(timeout=timeout_s)
    assert isinstance(event, PeerLost)
    return event


def listening_addresses() -> set[str]:
    """The addresses on which this process listens for TCP connections."""
    inodes = set(_socket_inodes())
    return {
        _address(fields[1].split(":")[0])
        for table in ("tcp", "tcp6")
        for fields in map(str.split, Path("/proc/net", table).read_text().splitlines()[1:])
        if fields[3] == "0A" and fields[9] in inodes
    }


def _socket_inodes() -> Iterator[str]:
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]


def _address(text: str) -> str:
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))
