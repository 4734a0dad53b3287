"""What both ends of a KV connection share: two lanes per epoch, one that copies and one that drives the wire.

With two lanes, packing chunk n + 1 overlaps sending chunk n, and unpacking chunk n overlaps receiving chunk n + 1. One
thread starts the jobs of both, those of the wire first, each lane's in the order in which they were asked for, and the
next before the one before has ended: each lane has a thread that waits for its ends, in the same order.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch

from kv_transfer import streams
from kv_transfer.events import PeerLost
from kv_transfer.jobs import JobThread
from kv_transfer.staging import StagingPool
from kv_transfer.transport import PairTransport, TransferError

logger = logging.getLogger(__name__)

E = TypeVar("E")
T = TypeVar("T")
# What leaves prefill is small beside the kernels of a prompt, whose blocks fill the device: behind them it would wait
# for a whole layer. So would a message that arrives, behind the unpack of the one before, which floods the device just
# when the next could begin; the few multiprocessors that it takes it holds anyway. An unpack itself goes no sooner than
# the kernels of a decode step.
LOW_PRIORITY, HIGH_PRIORITY = 0, -1
Finish = Callable[[], E | None]  # waits for what was started; its outcome, None where another job reports it


class _SlotAction(Protocol):
    """The part of Pack, StartSend, StartRecv and Unpack that a link needs."""

    @property
    def peer(self) -> str: ...
    @property
    def epoch(self) -> str: ...
    @property
    def slot(self) -> int: ...


class Lane:
    """A CUDA stream, and the thread that waits for what was launched on it."""

    def __init__(self, name: str, device: torch.device, priority: int) -> None:
        self.stream = TransferStream(device, priority)
        self.ends = JobThread(f"{name} end")


class Link(Generic[E]):
    """One end of one epoch. Owns its transport and its threads; `on_event` is called on them and must not block.

    The first failed job is reported as PeerLost and nothing after it; after `close` has returned, nothing at all.
    """

    def __init__(
        self,
        transport: PairTransport,
        staging: StagingPool,
        on_event: Callable[[E | PeerLost], None],
        name: str,
        copy_priority: int,
        close_timeout_s: float,
    ) -> None:
        self._transport = transport
        self._staging = staging
        self._on_event = on_event
        self._close_timeout_s = close_timeout_s
        self._stopped = threading.Event()
        self._reporting = threading.RLock()
        self._starts = JobThread(f"{name} start")
        self._copy = Lane(f"{name} copy", staging.device, copy_priority)
        self._wire = Lane(f"{name} wire", staging.device, HIGH_PRIORITY)

    def close(self) -> None:
        """Destroy the epoch: end the operations in flight, drop what is queued, end the threads. Idempotent.

        From any thread but the link's own. Takes at most the transport's bound and the copies in progress. When it
        returns, nothing of the link can touch staging or KV any more; raises TransferError if that was not reached.
        """
        with self._reporting:
            self._stopped.set()
        self._transport.close()
        for thread in (self._starts, self._wire.ends, self._copy.ends):
            if not thread.close(self._close_timeout_s):
                raise TransferError(f"a transfer thread is still busy {self._close_timeout_s} s after close")
        for lane in (self._wire, self._copy):
            lane.stream.close()

    def _submit(self, lane: Lane, action: _SlotAction, start: Callable[[], Finish[E] | None]) -> None:
        """`start` launches the job on the lane's stream and returns how to wait for it, None where another job does."""
        with self._reporting:
            if self._stopped.is_set():
                return
            if self._staging.hold(action.slot, action.epoch):
                self._starts.submit(partial(self._start, lane, action, start), is_urgent=lane is self._wire)
            else:
                self._lose(action, f"slot {action.slot} is still in use by an epoch before")

    def _start(self, lane: Lane, action: _SlotAction, start: Callable[[], Finish[E] | None]) -> None:
        finish: Finish[E] | None = None
        if not self._stopped.is_set():
            finish = self._attempt(action, start)
        if finish is None:
            self._staging.release(action.slot)
        else:
            lane.ends.submit(partial(self._end, action, finish))

    def _end(self, action: _SlotAction, finish: Finish[E]) -> None:
        # Also once stopped: a copy on the device must be waited for before the link may be called closed.
        event = self._attempt(action, finish)
        self._staging.release(action.slot)
        with self._reporting:
            if event is not None and not self._stopped.is_set():
                self._on_event(event)

    def _attempt(self, action: _SlotAction, call: Callable[[], T]) -> T | None:
        """The call's result; None when it failed, which ends the epoch."""
        try:
            return call()
        except TransferError as error:
            self._lose(action, str(error))
        except Exception as error:
            logger.exception("transfer job failed: %s", action)
            self._lose(action, f"{type(error).__name__} in a transfer job: {error}")
        return None

    def _lose(self, action: _SlotAction, reason: str) -> None:
        with self._reporting:
            if not self._stopped.is_set():
                self._stopped.set()
                self._on_event(PeerLost(action.peer, action.epoch, reason))


class TransferStream:
    """A CUDA stream for one lane; on the CPU, nothing. Zero is the lowest priority, negative ones go first."""

    def __init__(self, device: torch.device, priority: int) -> None:
        self._device = device
        self._priority = priority
        self._stream = streams.take(device, priority) if device.type == "cuda" else None

    def enter(self, event: torch.cuda.Event | None = None) -> None:
        """What the calling thread, which is the link's own, launches from now on runs on this stream, after `event`."""
        if self._stream is None:
            return
        torch.cuda.set_stream(self._stream)
        if event is not None:
            self._stream.wait_event(event)

    def close(self) -> None:
        """Nothing is launched any more; returns when what was has ended. Idempotent, also after it has raised."""
        if self._stream is not None:
            self._stream.synchronize()  # a start that failed after its launch is awaited by nobody else
            streams.give_back(self._stream, self._device, self._priority)
            self._stream = None
