"""What the long-lived streams of a worker need: a watch on the peer's silence, an orderly end, an outbox.

Used on the asyncio thread by the Attach service (router) and by both ends of a pair (the other worker), which need no
outbox: their frames go to the socket at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_QUEUED_FRAMES = 65536
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
STREAM_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
SERVER_OPTIONS = (*STREAM_OPTIONS, ("grpc.so_reuseport", 0))


class Outbox(Generic[T]):
    """Frames waiting for one stream's writer. A peer that reads too slowly overflows it, which ends the stream."""

    def __init__(self, limit: int = MAX_QUEUED_FRAMES) -> None:
        self._frames: deque[T] = deque()
        self._limit = limit
        self._wake = asyncio.Event()
        self._end_reason: str | None = None

    def put(self, frame: T) -> None:
        """Queue a frame; dropped once the stream has been told to end."""
        if self._end_reason is not None:
            return
        if len(self._frames) >= self._limit:
            self.end(f"the peer left {self._limit} frames unread")
            return
        self._frames.append(frame)
        self._wake.set()

    def end(self, reason: str) -> None:
        """Let the writer send what is queued and then end the stream. The first reason stays."""
        if self._end_reason is None:
            self._end_reason = reason
        self._wake.set()

    async def write_to(self, write: Callable[[T], Awaitable[object]]) -> str:
        """The stream's writer loop; returns the reason given to `end`."""
        while True:
            while self._frames:
                await write(self._frames.popleft())
            if self._end_reason is not None:
                return self._end_reason
            self._wake.clear()
            await self._wake.wait()


class SilenceWatch:
    """Ends a stream whose peer says nothing for `timeout_s`.

    Counts only time in which this process itself was awake, so that a pause of our own is not taken for the peer's:
    frames that arrived meanwhile are read before the verdict. Detection is late by at most an eighth of the timeout.
    """

    def __init__(self, timeout_s: float) -> None:
        if not timeout_s > 0.0:
            raise ValueError(f"a silence timeout must be positive, got {timeout_s}")
        self._timeout_s = timeout_s
        self._num_heard = 0

    def heard(self) -> None:
        self._num_heard += 1

    async def run(self) -> str:
        """Returns the verdict once the peer is silent."""
        period, silent = self._timeout_s / 8, 0.0
        while silent < self._timeout_s:
            before = self._num_heard
            await asyncio.sleep(period)
            silent = silent + period if self._num_heard == before else 0.0
        return f"silent for {self._timeout_s:g} s"


async def repeat(interval_s: float, action: Callable[[], None]) -> str:
    """Call `action` now and then every `interval_s`, for ever."""
    while True:
        action()
        await asyncio.sleep(interval_s)


async def run_until_first(name: str, loops: Mapping[str, Coroutine[None, None, str]]) -> str:
    """Run a stream's loops until one returns, cancel the others, return its reason. An exception goes to the caller."""
    tasks = [asyncio.create_task(loop, name=f"{name}:{part}") for part, loop in loops.items()]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
