"""Two processes hand KV over through the real links: content verified, bandwidth printed, peer killed, pair made anew.

    python -m benchmarks.transfer_smoke --backend gloo            # CPU tensors
    python -m benchmarks.transfer_smoke --backend nccl            # one GPU per process
    python -m benchmarks.transfer_smoke --backend gloo --device cuda   # both processes may share a GPU

This process is the decode end; it starts the prefill end and talks to it in the frames of protos/transfer.proto.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import sys
import threading
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from baton.worker.actor_base import SWITCH_INTERVAL_S
from benchmarks.transfer_case import NUM_BLOCKS, Options, source_cache
from kv_transfer.connection import DECODE_RANK, PREFILL_RANK, connect, nccl_environment
from kv_transfer.events import AttemptKey, Pack, Packed, PeerLost, Received, StartRecv, StartSend, Unpack, Unpacked
from kv_transfer.messages import Chunk, ChunksDone, LeaseKey
from kv_transfer.packing import make_packer
from kv_transfer.receiver import RecvEvent, RecvLink
from kv_transfer.rendezvous import StoreServer, connect_store
from kv_transfer.sender import SendEvent, SendLink
from kv_transfer.staging import StagingPool
from kv_transfer.transport import PairTransport
from kv_transfer.wire import DecodeValue, PrefillValue, decode_frame, parse_decode_frame, parse_prefill_frame
from kv_transfer.wire import prefill_frame as to_prefill_frame
from protos import transfer_pb2 as pb

HOST = "127.0.0.1"
LEASE = LeaseKey(1, 1)
WAIT_S = 60.0
ALL_DEVICES = "TRANSFER_SMOKE_DEVICES"


def join(options: Options, port: int, epoch: str, rank: int, server: StoreServer | None) -> PairTransport:
    store = server.store if server else connect_store(HOST, port, 20.0)
    return connect(
        options.backend,
        store,
        epoch,
        rank,
        host=HOST,
        device=options.device_of(rank),
        connect_timeout_s=WAIT_S,
        operation_timeout_s=options.operation_timeout_s,
        max_ctas=options.max_ctas,
    )


def read_frames(pipe: Connection, inbox: queue.Queue[bytes | SendEvent | RecvEvent | None]) -> None:
    """Thread: the peer's frames into the inbox, None when it is gone."""
    try:
        while True:
            inbox.put(pipe.recv_bytes())
    except (EOFError, OSError):
        inbox.put(None)


class PrefillEnd:
    """The started process: packs and sends as many chunks as the peer's credits allow, until it is killed."""

    def __init__(self, options: Options, pipe: Connection, transport: PairTransport, staging: StagingPool) -> None:
        self.options, self.pipe = options, pipe
        self.inbox: queue.Queue[bytes | SendEvent | RecvEvent | None] = queue.Queue()
        device = options.device_of(PREFILL_RANK)
        self.link = SendLink(transport, staging, make_packer(device), source_cache(options, device), self.inbox.put)
        self.packed = self.done = 0
        threading.Thread(target=read_frames, args=(pipe, self.inbox), daemon=True).start()

    def run(self) -> None:
        self.pack_ahead()
        while (item := self.inbox.get()) is not None:
            match item:
                case bytes():
                    self.on_frame(parse_decode_frame(pb.DecodeFrame.FromString(item)))
                case Packed():
                    self.on_packed(item)
                case PeerLost():
                    break
        self.link.close()

    def pack_ahead(self) -> None:
        while self.packed - self.done < self.options.window:
            seq, self.packed = self.packed, self.packed + 1
            slot, segment = seq % self.options.window, self.options.segment(seq)
            action = Pack("d", "e", seq, slot, AttemptKey("r", 0), LEASE, segment)
            self.link.pack(action, self.options.source_blocks(seq), None)

    def on_packed(self, event: Packed) -> None:
        segment, num_bytes = self.options.segment(event.seq), self.options.chunk_bytes
        self.send(Chunk(event.seq, LEASE, segment, num_bytes, event.fingerprints))
        self.link.start_send(StartSend("d", "e", event.seq, event.seq % self.options.window, num_bytes))

    def on_frame(self, value: DecodeValue) -> None:
        if isinstance(value, ChunksDone):
            self.done = value.through
            self.pack_ahead()

    def send(self, value: PrefillValue) -> None:
        self.pipe.send_bytes(to_prefill_frame(value).SerializeToString())


def prefill_main(options: Options, pipe: Connection, port: int, epoch: str) -> None:
    """Entry of the started process."""
    prepare(options, PREFILL_RANK)
    note("prefill: process is up")
    transport = join(options, port, epoch, PREFILL_RANK, None)
    note("prefill: joined")
    staging = StagingPool(options.layout, options.window, options.chunk_bytes, options.device_of(PREFILL_RANK))
    with on_device(options, PREFILL_RANK):
        for _ in range(options.chunks):
            transport.start_send(staging.slot(0)).wait()
    note("prefill: raw messages are sent")
    PrefillEnd(options, pipe, transport, staging).run()


class DecodeEnd:
    """This process. Receives, verifies and scatters; hands credits back."""

    def __init__(self, options: Options, server: StoreServer, epoch: str) -> None:
        self.options = options
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.peer: BaseProcess = context.Process(
            target=prefill_main, args=(options, theirs, server.port, epoch), daemon=True
        )
        self.peer.start()
        theirs.close()
        self.transport = join(options, server.port, epoch, DECODE_RANK, server)
        note("decode: joined")
        device = options.device_of(DECODE_RANK)
        self.cache = options.layout.allocate(NUM_BLOCKS, device)
        self.inbox: queue.Queue[bytes | SendEvent | RecvEvent | None] = queue.Queue()
        self.staging = StagingPool(options.layout, options.window, options.chunk_bytes, device)
        self.chunks: dict[int, Chunk] = {}
        self.done = 0

    def receive_raw(self) -> float:
        """Bytes per second of the transport alone."""
        with on_device(self.options, DECODE_RANK):
            self.transport.start_recv(self.staging.slot(0)).wait()
            start = time.monotonic()
            for _ in range(self.options.chunks - 1):
                self.transport.start_recv(self.staging.slot(0)).wait()
        return (self.options.chunks - 1) * self.options.chunk_bytes / (time.monotonic() - start)

    def receive_chunks(self, until: int) -> float:
        """Bytes per second from pack to scatter, after the first window of chunks, over all below `until`."""
        self.link = RecvLink(self.transport, self.staging, make_packer(self.cache.device), self.cache, self.inbox.put)
        threading.Thread(target=read_frames, args=(self.pipe, self.inbox), daemon=True).start()
        start, warm = 0.0, self.options.window
        while self.done < until:
            self.handle(self.inbox.get(timeout=WAIT_S))
            start = time.monotonic() if self.done <= warm else start
        return (until - warm) * self.options.chunk_bytes / (time.monotonic() - start)

    def handle(self, item: bytes | SendEvent | RecvEvent | None) -> None:
        window = self.options.window
        match item:
            case bytes():
                chunk = parse_prefill_frame(pb.PrefillFrame.FromString(item))
                assert isinstance(chunk, Chunk)
                self.chunks[chunk.seq] = chunk
                self.link.start_recv(StartRecv("p", "e", chunk.seq, chunk.seq % window, chunk.num_bytes))
            case Received(seq=seq):
                chunk = self.chunks.pop(seq)
                unpack = Unpack("p", "e", seq, seq % window, LEASE, chunk.segment, chunk.fingerprints)
                self.link.unpack(unpack, self.options.target_blocks(seq))
            case Unpacked(seq=seq, ok=ok):
                assert ok, f"chunk {seq} does not verify"
                self.done = seq + 1
                self.pipe.send_bytes(decode_frame(ChunksDone(self.done)).SerializeToString())
            case _:
                raise RuntimeError(f"the transfer ended with {item}")

    def verify(self) -> int:
        """Compare the blocks that arrived with their source; how many there were."""
        source = source_cache(self.options, torch.device("cpu")).view(torch.int16)
        mine = self.cache.cpu().view(torch.int16)
        pairs = {
            target: origin
            for seq in range(self.done)
            for target, origin in zip(self.options.target_blocks(seq), self.options.source_blocks(seq), strict=True)
        }
        targets, origins = list(pairs), list(pairs.values())
        assert torch.equal(mine[:, :, targets], source[:, :, origins]), "content differs"
        return len(pairs)

    def kill_peer(self) -> tuple[float, float]:
        """SIGKILL with a receive posted; seconds until PeerLost, and seconds that close() took.

        What the peer had launched before may still arrive, so one more receive is posted than it had credits.
        """
        self.peer.kill()
        killed = time.monotonic()
        for number in range(self.options.window + 1):
            self.link.start_recv(StartRecv("p", "e", (1 << 40) + number, 0, self.options.chunk_bytes))
        while not isinstance(self.inbox.get(timeout=WAIT_S), PeerLost):
            pass
        lost = time.monotonic()
        self.close()
        return lost - killed, time.monotonic() - lost

    def close(self) -> None:
        self.link.close()
        self.peer.kill()
        self.peer.join()


def prepare(options: Options, rank: int) -> None:
    """Before this process touches a GPU: what workers have in their environment."""
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if options.device == "cuda":
        os.environ.update(nccl_environment())
        if not options.shared_view:
            os.environ["CUDA_VISIBLE_DEVICES"] = options.visible_device(rank, os.environ[ALL_DEVICES])


def note(what: str) -> None:
    print(f"{time.monotonic():.3f} {what}", file=sys.stderr, flush=True)


def on_device(options: Options, rank: int) -> torch.cuda.device:
    """The rank's GPU as the thread's current device; nothing on the CPU."""
    device = options.device_of(rank)
    return torch.cuda.device(device if device.type == "cuda" else -1)


def run(options: Options) -> dict[str, object]:
    """The whole smoke; raises on the first thing that is wrong. GB are 1e9 bytes."""
    if options.device == "cuda":
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ.setdefault(ALL_DEVICES, seen)
    prepare(options, DECODE_RANK)
    if NUM_BLOCKS % options.blocks_per_chunk or options.chunk_bytes % options.layout.block_bytes:
        raise SystemExit(f"a chunk must be 1, 2, 4, ... {NUM_BLOCKS} blocks of {options.layout.block_bytes} bytes")
    server = StoreServer(HOST)
    start = time.monotonic()
    first = DecodeEnd(options, server, "epoch-0")
    connected = time.monotonic() - start
    raw = first.receive_raw()
    note("decode: raw messages are here")
    packed = first.receive_chunks(options.chunks)
    blocks = first.verify()
    note("decode: chunks are verified")
    lost_s, close_s = first.kill_peer()
    note("decode: killed peer, epoch destroyed")
    again = DecodeEnd(options, server, "epoch-1")
    again.receive_raw()
    again.receive_chunks(options.window + 20)
    again.verify()
    again.close()
    server.close()
    return {
        **asdict(options),
        "start_and_connect_s": round(connected, 2),
        "transport_gb_s": round(raw / 1e9, 2),
        "packed_verified_gb_s": round(packed / 1e9, 2),
        "blocks_compared": blocks,
        "kill_to_peer_lost_s": round(lost_s, 3),
        "close_s": round(close_s, 3),
        "new_epoch": "works",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--chunk-mib", type=int, default=8)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--max-ctas", type=int, default=4)
    parser.add_argument("--operation-timeout-s", type=float, default=2.0)
    parser.add_argument("--shared-view", action="store_true", help="both processes see all GPUs")
    args = parser.parse_args()
    device = args.device or ("cuda" if args.backend == "nccl" else "cpu")
    size = args.chunk_mib << 20
    options = Options(
        args.backend,
        device,
        args.chunks,
        size,
        args.window,
        args.max_ctas,
        args.operation_timeout_s,
        args.shared_view,
    )
    print(json.dumps(run(options), indent=2))


if __name__ == "__main__":
    main()
