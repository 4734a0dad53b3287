"""KV between GPUs: a two-rank NCCL communicator of one epoch.

NCCL on one host does not notice a dead peer and has no timeout that spares the process, so operations are watched here:
past its deadline the communicator is aborted. The processes must run with the variables of
`kv_transfer.connection.nccl_environment`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed.distributed_c10d import Store

from baton.common.errors import ConfigError
from kv_transfer.streams import borrowed
from kv_transfer.transport import PairGroup, TransferError, close_late, first_line, run_bounded

MESSAGE_BYTES = 32 * 1024 * 1024  # the largest: what a pair launches before others may
_TAG = 0
_ABORT_TIMEOUT_S = 5.0
_DRAIN_POLL_S = 0.001
_WATCHES_PER_TIMEOUT = 8


def connect_nccl(
    store: Store,
    rank: int,
    device: torch.device,
    connect_timeout_s: float,
    operation_timeout_s: float,
    launch_lock: threading.Lock,
    max_ctas: int,
) -> NcclTransport:
    """Join the communicator of two whose id lies in `store`, and move one byte through it, so that no chunk pays for
    connecting. `max_ctas` bounds the multiprocessors it takes from the model. Raises TransferError, ConfigError.
    """
    factory = getattr(torch.distributed, "ProcessGroupNCCL", None)
    if factory is None or device.type != "cuda":
        raise ConfigError("transfer.backend", f"NCCL needs a CUDA build of torch and a GPU, not {device.type}")

    def join() -> NcclTransport:
        # A stream of its own: on the thread's default one the model's kernels would wait for the peer's byte.
        with torch.cuda.device(device), borrowed(device):
            group = _make_group(factory, store, rank, device, connect_timeout_s, max_ctas)
            transport = NcclTransport(group, 1 - rank, operation_timeout_s, launch_lock)
            try:
                transport.exchange_first_byte(rank, device)
            except BaseException:
                close_late(transport)
                raise
        return transport

    # The communicator's set-up has no timeout of its own.
    return run_bounded(join, connect_timeout_s, "NCCL connect", close_late)


def _make_group(
    factory: Any,
    store: Store,
    rank: int,
    device: torch.device,
    timeout_s: float,
    max_ctas: int,
) -> PairGroup:
    options = factory.Options()
    options._timeout = timedelta(seconds=timeout_s)
    options.config.max_ctas = max_ctas
    options.is_high_priority_stream = True  # see `kv_transfer.link`
    group = factory(store, rank, 2, options)
    if hasattr(group, "eager_connect_single_device"):
        # Without it each first send or recv of a pair makes a further communicator.
        group.eager_connect_single_device(device)
    made: PairGroup = group
    return made


def _messages(buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (buffer,) if buffer.numel() <= MESSAGE_BYTES else torch.split(buffer, MESSAGE_BYTES)


class NcclTransport:
    """See `PairTransport`. Operations are ordered after the work on the caller's current CUDA stream.

    One of more than MESSAGE_BYTES is several messages, at both ends alike.

    `launch_lock` is shared by all transports of a device: NCCL orders launches by the program order of one host thread.
    It is held for a message at a time.
    Whoever waits for an operation blocks in its completion event; a watchdog of our own aborts the communicator when
    the oldest operation is overdue, which makes the event fire.
    """

    def __init__(self, group: PairGroup, peer: int, operation_timeout_s: float, launch_lock: threading.Lock) -> None:
        self._group: PairGroup | None = group
        self._peer = peer
        self._timeout_s = operation_timeout_s
        self._launch_lock = launch_lock
        self._closing = threading.Event()
        self._launching = threading.Lock()
        self._abort_lock = threading.Lock()
        self._aborted = False
        self._abort_failure = ""
        self._in_flight: deque[NcclTransfer] = deque()
        threading.Thread(target=self._watch, name="NCCL watchdog", daemon=True).start()

    def start_send(self, buffer: torch.Tensor) -> NcclTransfer:
        return self._start("send", buffer, self._launch_lock)

    def start_recv(self, buffer: torch.Tensor) -> NcclTransfer:
        return self._start("recv", buffer, self._launch_lock)

    def exchange_first_byte(self, rank: int, device: torch.device) -> None:
        """From prefill to decode. Launched without the lock: a first operation blocks its host thread on the peer."""
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        self._start("recv" if rank == 0 else "send", byte, nullcontext()).wait()

    def close(self) -> None:
        """Aborts what is in flight and waits until the GPU has left it. After TransferError, try again later."""
        self._closing.set()
        self._abort()
        if not self._launching.acquire(timeout=2 * _ABORT_TIMEOUT_S):
            raise TransferError("NCCL: a launch survived the abort of its communicator")
        try:
            if not self._drained(_ABORT_TIMEOUT_S):
                raise TransferError(f"NCCL: the GPU is still in an aborted operation {self._abort_failure}".rstrip())
            self._group = None
        except RuntimeError as error:
            raise TransferError(f"NCCL close: {first_line(error)}") from None
        finally:
            self._launching.release()

    def _start(self, what: str, buffer: torch.Tensor, launch_order: AbstractContextManager[object]) -> NcclTransfer:
        name = f"NCCL {what} of {buffer.numel()} bytes"
        with self._launching:
            if self._group is None or self._aborted or self._closing.is_set():
                raise TransferError(f"{name}: the connection is closed")
            start = self._group.send if what == "send" else self._group.recv
            try:
                for message in _messages(buffer):
                    with launch_order:
                        start([message], self._peer, _TAG).wait()  # orders the current stream after it, blocks nothing
                return self._launched(name)
            except RuntimeError as error:
                with suppress(RuntimeError):  # of a device that takes no event any more, nothing can be waited for
                    self._launched(name)  # messages before the one that failed: `close` must wait for them too
                self._abort()
                raise TransferError(f"{name}: {first_line(error)}") from None

    def _launched(self, name: str) -> NcclTransfer:
        """What was launched on the current stream until now is in flight, under a name."""
        done = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        done.record()
        transfer = NcclTransfer(self, name, done, time.monotonic() + self._timeout_s)
        self._in_flight.append(transfer)
        return transfer

    def finish(self, transfer: NcclTransfer) -> None:
        """Called by `NcclTransfer.wait` when its event has fired: by completion, or because of an abort."""
        if self._aborted:
            reason = "closed" if self._closing.is_set() else f"not complete within {self._timeout_s} s"
            raise TransferError(f"{transfer.name}: {reason}")
        with suppress(ValueError):  # `close` may have emptied it meanwhile
            self._in_flight.remove(transfer)

    def abort(self) -> None:
        """End the epoch because of a failure."""
        self._abort()

    def _watch(self) -> None:
        """The watchdog's thread: looks at the oldest operation, late by at most an eighth of the timeout."""
        while not self._closing.wait(self._timeout_s / _WATCHES_PER_TIMEOUT):
            oldest = next(iter(tuple(self._in_flight)), None)
            if oldest is not None and time.monotonic() > oldest.deadline and not oldest.is_complete():
                self._abort()
                return

    def _drained(self, timeout_s: float) -> bool:
        """Whether the GPU has left all operations, waiting for it within the time."""
        deadline = time.monotonic() + timeout_s
        wait = threading.Event().wait
        while not all(transfer.is_complete() for transfer in tuple(self._in_flight)):
            if time.monotonic() > deadline:
                return False
            wait(_DRAIN_POLL_S)
        self._in_flight.clear()
        return True

    def _abort(self) -> None:
        with self._abort_lock:
            group, self._aborted = (None if self._aborted else self._group), True
            if group is None:
                return
            try:
                run_bounded(group.abort, _ABORT_TIMEOUT_S, "NCCL abort")
            except TransferError as error:
                self._abort_failure = f"({error})"


class NcclTransfer:
    """See `Transfer`."""

    def __init__(self, transport: NcclTransport, name: str, done: torch.cuda.Event, deadline: float) -> None:
        self._transport = transport
        self.event = done
        self.name = name
        self.deadline = deadline

    def follow(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)

    def wait(self) -> None:
        try:
            self.event.synchronize()  # lets other threads run, and sleeps instead of spinning
        except RuntimeError as error:
            self._transport.abort()
            raise TransferError(f"{self.name}: {first_line(error)}") from None
        self._transport.finish(self)

    def is_complete(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]
