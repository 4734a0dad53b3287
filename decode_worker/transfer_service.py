"""Serves `Transfer.Connect`: one stream per prefill worker, one epoch of the pair's KV connection per stream.

Asyncio thread. Owns the store in which the two ends meet, on the advertised address only.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc

from baton.worker.half import WorkerContext
from baton.worker.join import ConnectedAhead, join_pair
from baton.worker.pair import Pair, Pairs
from baton.worker.threads import run_in_thread, start_thread
from kv_transfer.connection import DECODE_RANK, TransferError, resolve_backend
from kv_transfer.events import FromPrefill
from kv_transfer.messages import Abort, Chunk, Commit, Finish
from kv_transfer.packing import make_packer
from kv_transfer.receiver import RecvEvent, RecvLink
from kv_transfer.rendezvous import StoreServer
from kv_transfer.timeline import Timeline, clock_domain
from kv_transfer.wire import VERSION, Heartbeat, Hello, Refused, Welcome, WireError, decode_frame, parse_prefill_frame
from protos import transfer_pb2
from protos.transfer_pb2_grpc import TransferServicer

logger = logging.getLogger(__name__)
HELLO_TIMEOUT_S = 5.0

PrefillFrames = AsyncIterator[transfer_pb2.PrefillFrame]


class TransferService(TransferServicer):
    """`on_message` takes what a peer says, `on_transfer` what a link does, from any thread."""

    def __init__(
        self,
        context: WorkerContext,
        pairs: Pairs[transfer_pb2.DecodeFrame, RecvLink],
        on_message: Callable[[FromPrefill], None],
        on_transfer: Callable[[RecvEvent], None],
        timeline: Timeline,
    ) -> None:
        self._context = context
        self._pairs = pairs
        self._on_message = on_message
        self._on_transfer = on_transfer
        self._timeline = timeline
        self._clock_domain = clock_domain()
        self._store = StoreServer(context.host)
        self._packer = make_packer(context.device)
        self._launch_lock = threading.Lock()
        self._ahead = ConnectedAhead(context.config.transfer.num_pairs)
        self._stopping = False
        self._epochs = itertools.count(1)
        self._backend = resolve_backend(context.config.transfer.backend, context.device)

    def refuse_new(self) -> None:
        """The worker stops: a prefill worker that connects again is turned away."""
        self._stopping = True

    def close(self) -> None:
        """After every epoch is destroyed."""
        self._store.close()

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """A coroutine instead of a generator: gRPC then cancels it at once when the stream breaks."""
        if self._stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this worker stops")
        frames: PrefillFrames = aiter(request_iterator)
        hello = await self._read_hello(frames, context)
        differences = self._context.layout.differences(hello.layout)
        if hello.version != VERSION:
            differences.append(f"version of the hand-over: {VERSION} here, {hello.version} there")
        if differences:
            message = f"workers differ (decode here, prefill there): {'; '.join(differences)}"
            logger.error("prefill worker %s is refused: %s", hello.worker_id, message)
            await context.write(decode_frame(Refused(message)))
            return
        await self._end_older(hello.worker_id)
        epoch = f"{self._context.worker_id}/{next(self._epochs)}"
        try:
            await self._serve(hello, epoch, frames, context)
        except TransferError as error:
            logger.warning("no connection with %s: %s", hello.worker_id, error)
        finally:
            self._pairs.drop_staging(hello.worker_id)
            self._ahead.leave(epoch)
            start_thread(partial(self._store.forget, epoch), f"forget {epoch}")

    async def _serve(self, hello: Hello, epoch: str, frames: PrefillFrames, context: Any) -> None:
        pair = await self._join(hello, epoch, context)
        shared_clock = bool(hello.clock_domain) and hello.clock_domain == self._clock_domain
        await self._pairs.serve(pair, lambda: self._run(pair, frames, context, shared_clock))

    async def _read_hello(self, frames: PrefillFrames, context: Any) -> Hello:
        problem = "the stream did not begin with a hello"
        try:
            hello = parse_prefill_frame(await asyncio.wait_for(anext(frames), HELLO_TIMEOUT_S))
            if isinstance(hello, Hello):
                return hello
        except WireError as error:
            problem = str(error)
        except (TimeoutError, StopAsyncIteration):
            pass
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        raise AssertionError("abort raises")

    async def _end_older(self, peer: str) -> None:
        """A worker has one connection with us: what is left of its older one is destroyed first."""
        for older in self._pairs.of_peer(peer):
            await self._pairs.lose(older, "the prefill worker connected again")

    async def _join(self, hello: Hello, epoch: str, context: Any) -> Pair[transfer_pb2.DecodeFrame, RecvLink]:
        config, peer = self._context.config.transfer, hello.worker_id
        when_used = hello.join_when_used or not self._ahead.enter(epoch)
        staging = await self._pairs.staging(peer, config.window, config.slot_bytes, when_used)
        welcome = Welcome(
            self._context.worker_id,
            epoch,
            self._store.host,
            self._store.port,
            config.window,
            config.slot_bytes,
            self._backend,
            when_used,
        )
        await context.write(decode_frame(welcome))
        store = await run_in_thread(self._store.take, f"store for {epoch}")
        transport = await join_pair(
            self._context, self._launch_lock, self._backend, store, epoch, DECODE_RANK, when_used
        )
        if not when_used:
            self._store.give_back(store)
        link = RecvLink(
            transport, staging, self._packer, self._context.engine.kv_cache, self._on_transfer, self._timeline
        )
        return Pair(peer, epoch, link, config.window, config.slot_bytes)

    async def _run(
        self,
        pair: Pair[transfer_pb2.DecodeFrame, RecvLink],
        frames: PrefillFrames,
        context: Any,
        shared_clock: bool,
    ) -> str:
        def on_frame(frame: transfer_pb2.PrefillFrame) -> None:
            now = self._context.clock.now()
            value = parse_prefill_frame(frame)
            if isinstance(value, Chunk):
                known = shared_clock and frame.chunk.HasField("written_at_s")
                written_at = frame.chunk.written_at_s if known else None
                self._timeline.announced(pair.epoch, value.seq, value.lease.lease, value.num_bytes, written_at, now)
            match value:
                case Chunk() | Commit() | Finish() | Abort():
                    self._on_message(FromPrefill(pair.peer, pair.epoch, value))
                case Heartbeat():
                    pass
                case Hello():
                    raise WireError("PrefillFrame.frame", "is a Hello amid the stream")

        timing = self._context.config.router
        return await pair.run(
            self._context.injector.frames(frames),
            on_frame,
            context.write,
            lambda sequence: decode_frame(Heartbeat(sequence)),
            timing.heartbeat_interval_s,
            timing.heartbeat_timeout_s,
        )
