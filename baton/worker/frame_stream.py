"""Frames over one TCP connection: what the control stream between a pair of workers travels on. Asyncio thread.

A frame is its length, four bytes, big endian, and a protobuf message of that many bytes. A chunk's way is a chain of
short waits, so what a frame costs counts: it is written to the socket in the turn of the loop that sends it, and parsed
in the one that reads it. gRPC's asyncio stack takes each frame through a thread of its own on either side.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from google.protobuf.message import DecodeError, Message

from kv_transfer.wire import WireError

MAX_FRAME_BYTES = 16 * 1024 * 1024
_LENGTH = struct.Struct(">I")
_FRAME_BYTES = 1024  # what a parsed frame takes beside its data, at most
_UNREAD_BYTES = 4 * 1024 * 1024  # that wait for their reader before the socket is left alone
_UNSENT_BYTES = 64 * 1024 * 1024  # that a peer leaves unread before the stream breaks
_FLUSH_S = 2.0

In = TypeVar("In", bound=Message)
Out = TypeVar("Out", bound=Message)


class FrameStream(asyncio.Protocol, Generic[In, Out]):
    """One end of a connection, for `create_connection` and `create_server`. Iterate over it for the peer's frames.

    The iteration ends when the peer closes the stream, and raises ConnectionError when it breaks, WireError when the
    peer sends what is no frame; what came before is read first. `on_open` is told when the connection is up.
    `max_frame_bytes`: of the frames to come; may be set at any time.
    """

    def __init__(self, frame: type[In], on_open: Callable[[FrameStream[In, Out]], None] = lambda _: None) -> None:
        self.max_frame_bytes = MAX_FRAME_BYTES
        self._frame = frame
        self._on_open = on_open
        self._buffer = bytearray()
        self._frames: deque[tuple[In, int]] = deque()
        self._unread_bytes = 0
        self._is_paused = False
        self._news = asyncio.Event()  # a frame has come, or the end
        self._end: ConnectionError | WireError | None = None
        self._transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()

    # ---- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._on_open(self)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._buffer += data
        try:
            self._take_frames()
            if self._unread_bytes > _UNREAD_BYTES:
                self._is_paused = True
                self._transport.pause_reading()
        except WireError as error:
            self._end = error
            self._transport.abort()
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._end is None and (exc is not None or self._buffer):
            self._end = ConnectionError(str(exc) if exc is not None else "the connection ended amid a frame")
        self.lost.set()
        self._news.set()

    # ---- what the pair calls

    def __aiter__(self) -> FrameStream[In, Out]:
        return self

    async def __anext__(self) -> In:
        while not self._frames:
            if self.lost.is_set():
                if self._end is not None:
                    raise self._end
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        frame, length = self._frames.popleft()
        self._unread_bytes -= length + _FRAME_BYTES
        if self._is_paused and self._unread_bytes <= _UNREAD_BYTES // 2:
            assert self._transport is not None
            self._is_paused = False
            self._transport.resume_reading()
        return frame

    def send(self, frame: Out) -> None:
        """Send a frame in this turn of the loop, behind those before it; nothing of a stream that is over.

        A peer that reads too slowly breaks the stream, and the iteration says so.
        """
        if self._transport is None or self._transport.is_closing():
            return
        data = frame.SerializeToString()
        self._transport.write(_LENGTH.pack(len(data)) + data)
        if self._transport.get_write_buffer_size() > _UNSENT_BYTES:
            self._end = ConnectionError(f"the peer left {_UNSENT_BYTES} bytes unread")
            self._transport.abort()

    def close(self) -> None:
        """Send what was written, to a peer that reads, and end the stream. Idempotent."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
            asyncio.get_running_loop().call_later(_FLUSH_S, self._transport.abort)

    def _take_frames(self) -> None:
        """Raises WireError at the first that is none."""
        start, buffer = 0, self._buffer
        while len(buffer) - start >= _LENGTH.size:
            [length] = _LENGTH.unpack_from(buffer, start)
            if length > self.max_frame_bytes:
                raise WireError("frame", f"announces {length} bytes, the limit is {self.max_frame_bytes}")
            end = start + _LENGTH.size + length
            if end > len(buffer):
                break
            self._frames.append((self._parsed(bytes(buffer[start + _LENGTH.size : end])), length))
            self._unread_bytes += length + _FRAME_BYTES
            start = end
        del buffer[:start]

    def _parsed(self, data: bytes) -> In:
        try:
            return self._frame.FromString(data)
        except DecodeError:
            raise WireError("frame", f"is no {self._frame.DESCRIPTOR.name}") from None
