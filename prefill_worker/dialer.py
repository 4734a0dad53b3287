"""One epoch with a decode worker, seen from prefill: dial, hello, welcome, join, and serve until it is lost."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.distributed.distributed_c10d import Store

from baton.common.errors import ConfigError
from baton.worker.frame_stream import FrameStream
from baton.worker.half import WorkerContext
from baton.worker.join import ConnectedAhead, join_pair
from baton.worker.pair import Pair, Pairs
from baton.worker.threads import run_in_thread, start_thread
from kv_transfer.connection import PREFILL_RANK, PairTransport, TransferError
from kv_transfer.events import FromDecode
from kv_transfer.messages import Abort, ChunksDone, Committed
from kv_transfer.packing import make_packer
from kv_transfer.rendezvous import connect_store
from kv_transfer.sender import SendEvent, SendLink
from kv_transfer.timeline import clock_domain
from kv_transfer.wire import (
    VERSION,
    DecodeValue,
    Heartbeat,
    Hello,
    Refused,
    Welcome,
    WireError,
    parse_decode_frame,
    prefill_frame,
)
from protos.transfer_pb2 import DecodeFrame, PrefillFrame

logger = logging.getLogger(__name__)

Stream = FrameStream[DecodeFrame, PrefillFrame]


class PeerRefused(Exception):
    """The peer cannot exchange KV with us, now or later; the text names why."""


class PeerUnreachable(Exception):
    """This try failed; a later one may not."""


class Dialer:
    """Asyncio thread. `on_message` takes what a peer says, `on_transfer` what a link does, from any thread."""

    def __init__(
        self,
        context: WorkerContext,
        pairs: Pairs[PrefillFrame, SendLink],
        on_message: Callable[[FromDecode], None],
        on_transfer: Callable[[SendEvent], None],
    ) -> None:
        self._context = context
        self._pairs = pairs
        self._on_message = on_message
        self._on_transfer = on_transfer
        self._packer = make_packer(context.device)
        self._launch_lock = threading.Lock()
        self._ahead = ConnectedAhead(context.config.transfer.num_pairs)
        self._stores: dict[str, Store] = {}
        self._timeout_s = context.config.transfer.connect_timeout_s

    async def serve_once(
        self, worker_id: str, address: str, on_connected: Callable[[], None], on_lost: Callable[[str], None]
    ) -> str:
        """Be connected once; returns why the connection failed or ended, when nothing of it is left.

        `on_lost` is told at once that it has ended. Raises PeerRefused.
        """
        stream = Stream(DecodeFrame)
        try:
            await self._dial(stream, address)
            welcome = await self._greet(stream, worker_id)
            staging = await self._pairs.staging(worker_id, welcome.window, welcome.slot_bytes, welcome.join_when_used)
            transport = await self._join(stream, welcome)
            link = SendLink(transport, staging, self._packer, self._context.engine.kv_cache, self._on_transfer)
            pair = Pair[PrefillFrame, SendLink](
                worker_id, welcome.epoch, stream, link, welcome.window, welcome.slot_bytes
            )
            return await self._pairs.serve(pair, lambda: self._run(stream, pair, on_connected), on_lost)
        except (ConnectionError, PeerUnreachable, TransferError, WireError) as error:
            return str(error)
        except ConfigError as error:
            raise PeerRefused(str(error)) from error
        except TimeoutError:
            return f"no answer within {self._timeout_s:g} s"
        finally:
            stream.close()
            self._pairs.drop_staging(worker_id)

    def forget(self, worker_id: str) -> None:
        """Nobody wants this peer any more."""
        self._stores.pop(worker_id, None)
        self._ahead.leave(worker_id)

    async def _dial(self, stream: Stream, address: str) -> None:
        """Raises PeerUnreachable, TimeoutError."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._context.loop.create_connection(lambda: stream, host, int(port))
        except (OSError, ValueError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise PeerUnreachable(f"nobody answers at {address!r}: {error}") from error

    async def _greet(self, stream: Stream, worker_id: str) -> Welcome:
        when_used = not self._ahead.enter(worker_id)
        hello = Hello(self._context.worker_id, self._context.layout, clock_domain(), when_used)
        async with asyncio.timeout(self._timeout_s):
            stream.send(prefill_frame(hello))
            answer = await _read(stream)
        match answer:
            case Refused(message):
                raise PeerRefused(message)
            case Welcome() if answer.worker_id != worker_id:
                raise PeerUnreachable(f"{answer.worker_id} answers at this address")
            case Welcome() if answer.version != VERSION:
                raise PeerRefused(f"version of the hand-over: {VERSION} here, {answer.version} there")
            case Welcome():
                return answer
            case _:
                raise PeerUnreachable(f"the peer answered hello with {type(answer).__name__}")

    async def _join(self, stream: Stream, welcome: Welcome) -> PairTransport:
        """Join the process group, and return when the peer's end is up too: its first heartbeat says so."""
        ready = asyncio.create_task(_read(stream), name=f"ready:{welcome.epoch}")
        joining = asyncio.create_task(self._join_group(welcome), name=f"join:{welcome.epoch}")
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                await asyncio.wait({ready, joining}, return_when=asyncio.FIRST_COMPLETED)
                if not ready.done():
                    await joining
                first = await ready
                if isinstance(first, Refused):
                    raise PeerRefused(first.message)
                if not isinstance(first, Heartbeat):
                    raise PeerUnreachable("the peer did not join")
                return await joining
        except BaseException:
            ready.cancel()
            ready.add_done_callback(_retrieve)
            joining.cancel()
            joining.add_done_callback(_close_unused)
            raise

    async def _join_group(self, welcome: Welcome) -> PairTransport:
        store = self._stores.pop(welcome.worker_id, None)
        if store is None:
            open_store = partial(connect_store, welcome.store_host, welcome.store_port, self._timeout_s)
            store = await run_in_thread(open_store, f"store of {welcome.worker_id}")
        transport = await join_pair(
            self._context,
            self._launch_lock,
            welcome.backend,
            store,
            welcome.epoch,
            PREFILL_RANK,
            welcome.join_when_used,
        )
        self._stores[welcome.worker_id] = store
        return transport

    async def _run(self, stream: Stream, pair: Pair[PrefillFrame, SendLink], on_connected: Callable[[], None]) -> str:
        on_connected()

        def on_frame(frame: DecodeFrame) -> None:
            value = parse_decode_frame(frame)
            match value:
                case ChunksDone() | Committed() | Abort():
                    self._on_message(FromDecode(pair.peer, pair.epoch, value))
                case Heartbeat():
                    pass
                case Welcome() | Refused():
                    raise WireError("DecodeFrame.frame", f"is a {type(value).__name__} amid the stream")

        timing = self._context.config.router
        return await pair.run(
            self._context.injector.frames(aiter(stream)),
            on_frame,
            lambda sequence: prefill_frame(Heartbeat(sequence)),
            timing.heartbeat_interval_s,
            timing.heartbeat_timeout_s,
        )


async def _read(stream: Stream) -> DecodeValue:
    """The next frame. Raises PeerUnreachable at the stream's end."""
    try:
        return parse_decode_frame(await anext(stream))
    except StopAsyncIteration:
        raise PeerUnreachable("the peer closed the stream") from None


def _retrieve(ready: asyncio.Task[Any]) -> None:
    """The try has failed for another reason already: asyncio need not warn of this one."""
    if not ready.cancelled():
        ready.exception()


def _close_unused(joining: asyncio.Task[PairTransport]) -> None:
    if not joining.cancelled() and joining.exception() is None:
        start_thread(joining.result().close, "close unused")
