"""The epochs of a half's KV connections: one `Pair` per epoch, from PeerConnected to EpochDestroyed.

Both halves use it alike: a pair is a control stream (frames F out), a link that moves KV (L), and the promise that
EpochDestroyed is reported only when nothing of the link can touch memory any more. Asyncio thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, Protocol, TypeVar

import torch

from baton.engine.kv_layout import KVLayout
from baton.worker.faults import Faults
from baton.worker.streams import SilenceWatch, repeat, run_until_first
from baton.worker.tasks import Tasks
from baton.worker.threads import run_in_thread
from kv_transfer.events import EpochDestroyed, PeerConnected, PeerLost
from kv_transfer.staging import StagingPool
from kv_transfer.wire import WireError

logger = logging.getLogger(__name__)
CLOSE_RETRY_S = 1.0


class Closable(Protocol):
    def close(self) -> None:
        """May block for seconds; raises when memory could still be touched, and may then be tried again."""
        ...


F = TypeVar("F")
Out = TypeVar("Out", contravariant=True)
L = TypeVar("L", bound=Closable)
R = TypeVar("R")
PairEvent = PeerConnected | PeerLost | EpochDestroyed


class Outlet(Protocol[Out]):
    """What a pair needs of its stream to say something. Frames go out in the turn of the loop that sends them."""

    def send(self, frame: Out) -> None: ...


class Pair(Generic[F, L]):
    """One epoch with one peer. `slot_bytes` bounds a chunk."""

    def __init__(self, peer: str, epoch: str, stream: Outlet[F], link: L, window: int, slot_bytes: int) -> None:
        self.peer = peer
        self.epoch = epoch
        self.link = link
        self.window = window
        self.slot_bytes = slot_bytes
        self.send = stream.send
        self.destroyed = asyncio.Event()
        self._told_to_end = asyncio.Event()
        self._end_reason = ""

    async def run(
        self,
        frames: AsyncIterator[R],
        on_frame: Callable[[R], None],
        heartbeat: Callable[[int], F],
        interval_s: float,
        timeout_s: float,
    ) -> str:
        """Drive the control stream until it breaks, falls silent, carries nonsense or is told to end; the reason."""
        watch = SilenceWatch(timeout_s)
        sequence = itertools.count()

        async def read() -> str:
            async for frame in frames:
                watch.heard()
                on_frame(frame)
            return "the peer closed the stream"

        loops = {
            "read": read(),
            "end": self._told(),
            "beat": repeat(interval_s, lambda: self.send(heartbeat(next(sequence)))),
            "watch": watch.run(),
        }
        try:
            return await run_until_first(f"pair:{self.epoch}", loops)
        except WireError as error:
            return f"the peer sent an invalid frame: {error}"
        except ConnectionError as error:
            return f"the stream broke: {error}"

    def end(self, reason: str) -> None:
        """Let `run` return. The first reason stays."""
        self._end_reason = self._end_reason or reason
        self._told_to_end.set()

    async def _told(self) -> str:
        await self._told_to_end.wait()
        return self._end_reason


class Pairs(Generic[F, L]):
    """The live and dying epochs of one half, and the staging of each peer, which outlives an epoch."""

    def __init__(
        self, feed: Callable[[PairEvent], None], layout: KVLayout, device: torch.device, tasks: Tasks, faults: Faults
    ) -> None:
        self._feed = feed
        self._layout = layout
        self._device = device
        self._tasks = tasks
        self._faults = faults
        self._pairs: dict[str, Pair[F, L]] = {}
        self._staging: dict[str, StagingPool] = {}

    async def staging(self, peer: str, window: int, slot_bytes: int, when_used: bool) -> StagingPool:
        """The peer's slots, their memory taken now or `when_used`.

        Raises ConfigError when one is too small, TransferError when the memory is not there.
        """
        pool = self._staging.get(peer)
        if pool is None or (pool.num_slots, pool.slot_bytes) != (window, slot_bytes):
            pool = self._staging[peer] = StagingPool(self._layout, window, slot_bytes, self._device)
        if not when_used:
            await run_in_thread(pool.allocate, f"staging for {peer}")
        return pool

    def drop_staging(self, peer: str) -> None:
        """To be called when a connection of the peer has ended; its slots go with the last one that has a link."""
        if not self.of_peer(peer):
            self._staging.pop(peer, None)

    def links(self) -> list[L]:
        """Of the live and dying epochs."""
        return [pair.link for pair in self._pairs.values()]

    def of_peer(self, peer: str) -> list[Pair[F, L]]:
        return [pair for pair in self._pairs.values() if pair.peer == peer]

    def get(self, epoch: str) -> Pair[F, L]:
        """Raises KeyError for an epoch that is destroyed."""
        return self._pairs[epoch]

    def send(self, epoch: str, frame: F) -> None:
        """Send a frame; dropped when the epoch is gone."""
        if epoch in self._pairs:
            self._pairs[epoch].send(frame)

    async def serve(
        self, pair: Pair[F, L], stream: Callable[[], Awaitable[str]], on_lost: Callable[[str], None] = logger.debug
    ) -> str:
        """Announce the epoch, await its stream's end, and return that end's reason when the epoch is destroyed.

        Also when cancelled: the epoch is then torn down in the background. `on_lost` does not wait for that.
        """
        self._pairs[pair.epoch] = pair
        self._feed(PeerConnected(pair.peer, pair.epoch, pair.window))
        logger.info("connected with %s, epoch %s", pair.peer, pair.epoch)
        reason = "the stream broke"
        try:
            reason = await stream()
        finally:
            logger.info("lost %s, epoch %s: %s", pair.peer, pair.epoch, reason)
            self._feed(PeerLost(pair.peer, pair.epoch, reason))
        on_lost(reason)
        await pair.destroyed.wait()
        return reason

    async def lose(self, pair: Pair[F, L], reason: str) -> None:
        """Tear an epoch down and wait until it is destroyed."""
        self._feed(PeerLost(pair.peer, pair.epoch, reason))
        await pair.destroyed.wait()

    def destroy(self, epoch: str, reason: str) -> None:
        """Execute DestroyEpoch: end the stream, then the link, then say so."""
        pair = self._pairs[epoch]
        pair.end(reason)
        self._tasks.spawn(self._destroy(pair), f"destroy:{epoch}")

    async def stop(self, reason: str, timeout_s: float) -> None:
        """Lose every epoch and wait until all are destroyed, at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(self.lose(pair, reason) for pair in list(self._pairs.values())))
        except TimeoutError:
            logger.error("epochs not destroyed after %g s: %s", timeout_s, sorted(self._pairs))

    async def _destroy(self, pair: Pair[F, L]) -> None:
        while True:
            try:
                await run_in_thread(pair.link.close, f"close {pair.epoch}")
                break
            except Exception:
                # Its slots and blocks stay quarantined until it works: memory that may be touched is never reused.
                self._faults.add()
                logger.exception("epoch %s could not be destroyed", pair.epoch)
                await asyncio.sleep(CLOSE_RETRY_S)
        del self._pairs[pair.epoch]
        self.drop_staging(pair.peer)
        self._feed(EpochDestroyed(pair.peer, pair.epoch))
        pair.destroyed.set()
