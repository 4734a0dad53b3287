"""Where prefill workers connect: one stream per prefill worker, one epoch of the pair's KV connection per stream.

Asyncio thread. Owns the store in which the two ends meet. Both listen on the advertised address only.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from baton.common.errors import ConfigError
from baton.worker.frame_stream import MAX_FRAME_BYTES, FrameStream
from baton.worker.half import WorkerContext
from baton.worker.join import ConnectedAhead, join_pair
from baton.worker.pair import Pair, Pairs
from baton.worker.tasks import Tasks
from baton.worker.threads import run_in_thread, start_thread
from kv_transfer.connection import DECODE_RANK, TransferError, resolve_backend
from kv_transfer.events import FromPrefill
from kv_transfer.messages import Abort, Chunk, Commit, Finish
from kv_transfer.packing import make_packer
from kv_transfer.receiver import RecvEvent, RecvLink
from kv_transfer.rendezvous import StoreServer
from kv_transfer.timeline import Timeline, clock_domain
from kv_transfer.wire import VERSION, Heartbeat, Hello, Refused, Welcome, WireError, decode_frame, parse_prefill_frame
from protos.transfer_pb2 import DecodeFrame, PrefillFrame

logger = logging.getLogger(__name__)
HELLO_TIMEOUT_S = 5.0
MAX_HELLO_BYTES = 64 * 1024
MAX_STRANGERS = 64  # streams without a hello yet

Stream = FrameStream[PrefillFrame, DecodeFrame]


class Listener:
    """`on_message` takes what a peer says, on the asyncio thread, `on_transfer` what a link does, on any."""

    def __init__(
        self,
        context: WorkerContext,
        pairs: Pairs[DecodeFrame, RecvLink],
        on_message: Callable[[FromPrefill], None],
        on_transfer: Callable[[RecvEvent], None],
        timeline: Timeline,
        tasks: Tasks,
    ) -> None:
        self.address = ""
        self._server: asyncio.Server | None = None
        self._context = context
        self._pairs = pairs
        self._on_message = on_message
        self._on_transfer = on_transfer
        self._timeline = timeline
        self._tasks = tasks
        self._clock_domain = clock_domain()
        self._store = StoreServer(context.host)
        self._packer = make_packer(context.device)
        self._launch_lock = threading.Lock()
        self._ahead = ConnectedAhead(context.config.transfer.num_pairs)
        self._epochs = itertools.count(1)
        self._num_strangers = 0
        self._backend = resolve_backend(context.config.transfer.backend, context.device)

    async def start(self) -> None:
        """Listen on a free port of the advertised host. Afterwards `address` is set."""
        host = self._context.host
        self._server = await self._context.loop.create_server(lambda: Stream(PrefillFrame, self._on_open), host, 0)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    def refuse_new(self) -> None:
        """The worker stops: nobody can connect any more."""
        if self._server is not None:
            self._server.close()

    def close(self) -> None:
        """After every epoch is destroyed."""
        self._store.close()

    def _on_open(self, stream: Stream) -> None:
        stream.max_frame_bytes = MAX_HELLO_BYTES
        if self._num_strangers >= MAX_STRANGERS:
            logger.warning("%d streams without a hello: one more is turned away", self._num_strangers)
            stream.close()
            return
        self._num_strangers += 1
        self._tasks.spawn(self._attend(stream), "a prefill worker's stream")

    async def _attend(self, stream: Stream) -> None:
        try:
            hello = await self._read_hello(stream)
            if self._fits(hello, stream):
                stream.max_frame_bytes = MAX_FRAME_BYTES
                await self._end_older(hello.worker_id)
                await self._serve(hello, stream)
        except ConfigError as error:  # a setting of ours rules this peer out, now and later
            logger.error("a prefill worker is refused: %s", error)
            stream.send(decode_frame(Refused(str(error))))
        except (ConnectionError, TransferError, WireError) as error:
            logger.warning("no connection with a prefill worker: %s", error)
        finally:
            stream.close()

    async def _read_hello(self, stream: Stream) -> Hello:
        """Raises WireError when the stream begins with anything else, ConnectionError when with nothing."""
        try:
            hello = parse_prefill_frame(await asyncio.wait_for(anext(stream), HELLO_TIMEOUT_S))
        except (TimeoutError, StopAsyncIteration):
            raise ConnectionError("a stream that did not begin with a hello") from None
        finally:
            self._num_strangers -= 1
        if not isinstance(hello, Hello):
            raise WireError("PrefillFrame.frame", f"is a {type(hello).__name__} where a Hello must be")
        return hello

    def _fits(self, hello: Hello, stream: Stream) -> bool:
        """Whether KV can be exchanged with this peer; it is told what differs."""
        differences = self._context.layout.differences(hello.layout)
        if hello.version != VERSION:
            differences.append(f"version of the hand-over: {VERSION} here, {hello.version} there")
        if differences:
            message = f"workers differ (decode here, prefill there): {'; '.join(differences)}"
            logger.error("prefill worker %s is refused: %s", hello.worker_id, message)
            stream.send(decode_frame(Refused(message)))
        return not differences

    async def _serve(self, hello: Hello, stream: Stream) -> None:
        epoch = f"{self._context.worker_id}/{next(self._epochs)}"
        shared_clock = bool(hello.clock_domain) and hello.clock_domain == self._clock_domain
        try:
            leaving = asyncio.create_task(_cancel_when_lost(stream, asyncio.current_task(), hello.worker_id))
            try:
                pair = await self._join(hello, epoch, stream)
            finally:
                leaving.cancel()
            await self._pairs.serve(pair, lambda: self._run(pair, stream, shared_clock))
        finally:
            self._pairs.drop_staging(hello.worker_id)
            self._ahead.leave(epoch)
            start_thread(partial(self._store.forget, epoch), f"forget {epoch}")

    async def _end_older(self, peer: str) -> None:
        """A worker has one connection with us: what is left of its older one is destroyed first."""
        for older in self._pairs.of_peer(peer):
            await self._pairs.lose(older, "the prefill worker connected again")

    async def _join(self, hello: Hello, epoch: str, stream: Stream) -> Pair[DecodeFrame, RecvLink]:
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
        stream.send(decode_frame(welcome))
        store = await run_in_thread(self._store.take, f"store for {epoch}")
        transport = await join_pair(
            self._context, self._launch_lock, self._backend, store, epoch, DECODE_RANK, when_used
        )
        if not when_used:
            self._store.give_back(store)
        link = RecvLink(
            transport, staging, self._packer, self._context.engine.kv_cache, self._on_transfer, self._timeline
        )
        return Pair(peer, epoch, stream, link, config.window, config.slot_bytes)

    async def _run(self, pair: Pair[DecodeFrame, RecvLink], stream: Stream, shared_clock: bool) -> str:
        def on_frame(frame: PrefillFrame) -> None:
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
            self._context.injector.frames(aiter(stream)),
            on_frame,
            lambda sequence: decode_frame(Heartbeat(sequence)),
            timing.heartbeat_interval_s,
            timing.heartbeat_timeout_s,
        )


async def _cancel_when_lost(stream: Stream, task: asyncio.Task[Any] | None, peer: str) -> None:
    """For the time in which nobody reads from the stream."""
    await stream.lost.wait()
    logger.warning("%s left before it had joined", peer)
    assert task is not None
    task.cancel()
