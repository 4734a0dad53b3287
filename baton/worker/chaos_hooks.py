"""Faults for chaos tests. Of KV connections: late, lost and doubled frames, a slow link, chunks with flipped bits,
truncated or stale. Of routers' streams: late frames and breaks.

One injector per worker, used where a control stream is read (asyncio thread) and around the transport that moves KV
(transfer threads). Unless `chaos.enabled` it is a `NoFaults`, which hands everything through as it is.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol, TypeVar

import torch

from baton.common.config import ChaosConfig, FaultSettings
from baton.common.errors import ConfigError
from kv_transfer.transport import PairTransport, Transfer

T = TypeVar("T")


class Injector(Protocol):
    """What a worker needs of it."""

    def frames(self, frames: AsyncIterator[T]) -> AsyncIterator[T]:
        """The control frames of one stream of a peer as they shall be read."""
        ...

    def router_frames(self, frames: AsyncIterator[T]) -> AsyncIterator[T]:
        """The frames of one router's stream as they shall be read."""
        ...

    def transport(self, transport: PairTransport) -> PairTransport:
        """The KV connection of one epoch as it shall behave."""
        ...

    def set(self, settings: FaultSettings) -> None:
        """Settings for all streams and connections from now on. Raises ConfigError where faults are not allowed."""
        ...


def make_injector(config: ChaosConfig) -> Injector:
    return FaultInjector(config.seed, config.faults) if config.enabled else NoFaults()


class FrameFaults(NamedTuple):
    """Of one stream at this moment. Probabilities are per frame; `breaks` ends the stream."""

    delay_s: float
    jitter_s: float
    loss: float
    duplication: float
    breaks: float


class NoFaults:
    """See `Injector`: nothing is disturbed, nor can be."""

    def frames(self, frames: AsyncIterator[T]) -> AsyncIterator[T]:
        return frames

    def router_frames(self, frames: AsyncIterator[T]) -> AsyncIterator[T]:
        return frames

    def transport(self, transport: PairTransport) -> PairTransport:
        return transport

    def set(self, settings: FaultSettings) -> None:
        raise ConfigError("chaos.enabled", f"is off, so this worker does not take {settings}")


class FaultInjector:
    """See `Injector`. `settings` is replaced as a whole, on the asyncio thread; transfer threads read it.

    Each stream and connection draws from a generator of its own, seeded by `seed` and their order.
    """

    def __init__(self, seed: int, settings: FaultSettings) -> None:
        self.settings = settings
        self._seed = seed
        self._numbers = itertools.count()

    def set(self, settings: FaultSettings) -> None:
        self.settings = settings

    def transport(self, transport: PairTransport) -> PairTransport:
        return FaultyTransport(transport, self, self._generator())

    def frames(self, frames: AsyncIterator[T]) -> AsyncIterator[T]:
        return self._disturbed(frames, _of_peer)

    def router_frames(self, frames: AsyncIterator[T]) -> AsyncIterator[T]:
        return self._disturbed(frames, _of_router)

    async def _disturbed(
        self, frames: AsyncIterator[T], faults_of: Callable[[FaultSettings], FrameFaults]
    ) -> AsyncIterator[T]:
        line: asyncio.Queue[tuple[float, T] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        reading = asyncio.create_task(self._read(frames, line, faults_of), name="chaos: read")
        try:
            while (item := await line.get()) is not None:
                due, frame = item
                await asyncio.sleep(max(due - loop.time(), 0.0))
                yield frame
            await reading  # raises what broke the stream
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self,
        frames: AsyncIterator[T],
        line: asyncio.Queue[tuple[float, T] | None],
        faults_of: Callable[[FaultSettings], FrameFaults],
    ) -> None:
        generator, loop = self._generator(), asyncio.get_running_loop()
        try:
            async for frame in frames:
                faults = faults_of(self.settings)
                if generator.random() < faults.breaks:
                    return
                due = loop.time() + faults.delay_s + faults.jitter_s * generator.random()
                for _ in range(_num_copies(faults, generator)):
                    line.put_nowait((due, frame))
        finally:
            line.put_nowait(None)

    def _generator(self) -> random.Random:
        return random.Random(f"{self._seed} {next(self._numbers)}")


def _of_peer(settings: FaultSettings) -> FrameFaults:
    return FrameFaults(
        settings.frame_delay_s, settings.frame_jitter_s, settings.frame_loss, settings.frame_duplication, 0.0
    )


def _of_router(settings: FaultSettings) -> FrameFaults:
    return FrameFaults(settings.router_delay_s, settings.router_jitter_s, 0.0, 0.0, settings.router_break)


def _num_copies(faults: FrameFaults, generator: random.Random) -> int:
    if generator.random() < faults.loss:
        return 0
    return 2 if generator.random() < faults.duplication else 1


class FaultyTransport:
    """See `PairTransport`: a slow link on what is sent, spoilt chunks in what is received."""

    def __init__(self, transport: PairTransport, injector: FaultInjector, generator: random.Random) -> None:
        self._transport = transport
        self._injector = injector
        self._generator = generator
        self._closing = threading.Event()

    def start_send(self, buffer: torch.Tensor) -> Transfer:
        rate = self._injector.settings.bytes_per_s
        if rate:
            self._closing.wait(buffer.numel() / rate)
        return self._transport.start_send(buffer)

    def start_recv(self, buffer: torch.Tensor) -> Transfer:
        settings = self._injector.settings
        before = buffer.clone() if settings.stale or settings.truncation else None
        receive = self._transport.start_recv(buffer)
        return _FaultyReceive(receive, buffer, before, self._injector, self._generator)

    def close(self) -> None:
        self._closing.set()
        self._transport.close()


class _FaultyReceive:
    """See `Transfer`: a bit may differ from what was sent, or all or the second half be what the slot held `before`."""

    def __init__(
        self,
        receive: Transfer,
        buffer: torch.Tensor,
        before: torch.Tensor | None,
        injector: FaultInjector,
        generator: random.Random,
    ) -> None:
        self._receive = receive
        self._buffer = buffer
        self._before = before
        self._injector = injector
        self._generator = generator
        self._spoiling = threading.Lock()
        self._is_spoilt = False

    @property
    def event(self) -> torch.cuda.Event | None:
        return self._receive.event

    def follow(self) -> None:
        """On the device, on the caller's stream between the receive and what reads it."""
        self._receive.follow()
        if self._before is not None and self._before.device.type == "cuda":
            # Cloned on another stream: not to be given away before this one has read it.
            self._before.record_stream(torch.cuda.current_stream(self._before.device))
        self._spoil_once()

    def wait(self) -> None:
        """Of what the device orders nothing is spoilt here: this thread's stream is the model's."""
        self._receive.wait()
        if self.event is None:
            self._spoil_once()

    def _spoil_once(self) -> None:
        """The end of the receive is followed once and waited for once, on any threads."""
        with self._spoiling:
            if not self._is_spoilt:
                self._is_spoilt = True
                self._spoil()

    def _spoil(self) -> None:
        settings, buffer, draw = self._injector.settings, self._buffer, self._generator.random
        if draw() < settings.corruption:
            buffer[self._generator.randrange(buffer.numel())] ^= 1 << self._generator.randrange(8)
        if self._before is None:
            return
        if draw() < settings.stale:
            buffer.copy_(self._before)
        elif draw() < settings.truncation:
            half = buffer.numel() // 2
            buffer[half:].copy_(self._before[half:])
