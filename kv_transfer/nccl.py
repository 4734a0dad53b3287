"""KV between GPUs: a two-rank NCCL communicator of one epoch.

NCCL on one host does not notice a dead peer and has no timeout that spares the process, so each operation is watched
here: its completion event is polled against a deadline, past which the communicator is aborted. The processes must run
with the variables of `kv_transfer.connection.nccl_environment`.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed.distributed_c10d import Store

from baton.common.errors import ConfigError
from kv_transfer.transport import PairGroup, TransferError, first_line, run_bounded

_TAG = 0
_ABORT_TIMEOUT_S = 5.0
_SHORT_POLL_S, _SHORT_POLLS, _LONG_POLL_S = 0.00005, 40, 0.0005


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
        with torch.cuda.device(device):
            group = _make_group(factory, store, rank, device, connect_timeout_s, max_ctas)
            transport = NcclTransport(group, 1 - rank, operation_timeout_s, launch_lock)
            transport.exchange_first_byte(rank, device)
        return transport

    # The communicator's set-up has no timeout of its own.
    return run_bounded(join, connect_timeout_s, "NCCL connect")


def _make_group(
    factory: Any, store: Store, rank: int, device: torch.device, timeout_s: float, max_ctas: int
) -> PairGroup:
    options = factory.Options()
    options._timeout = timedelta(seconds=timeout_s)
    options.config.max_ctas = max_ctas
    group = factory(store, rank, 2, options)
    if hasattr(group, "eager_connect_single_device"):
        # Without it each first send or recv of a pair makes a further communicator.
        group.eager_connect_single_device(device)
    made: PairGroup = group
    return made


class NcclTransport:
    """See `PairTransport`. Operations are ordered after the work on the caller's current CUDA stream.

    `launch_lock` is shared by all transports of a device: NCCL orders launches by the program order of one host thread.
    """

    def __init__(self, group: PairGroup, peer: int, operation_timeout_s: float, launch_lock: threading.Lock) -> None:
        self._group: PairGroup | None = group
        self._peer = peer
        self._timeout_s = operation_timeout_s
        self._launch_lock = launch_lock
        self._closing = threading.Event()
        self._operation = threading.Lock()
        self._abort_lock = threading.Lock()
        self._aborted = False
        self._abort_failure = ""
        self._in_flight: torch.cuda.Event | None = None

    def send(self, buffer: torch.Tensor) -> None:
        self._run("send", buffer, self._launch_lock)

    def recv(self, buffer: torch.Tensor) -> None:
        self._run("recv", buffer, self._launch_lock)

    def exchange_first_byte(self, rank: int, device: torch.device) -> None:
        """From prefill to decode. Launched without the lock: a first operation blocks its host thread on the peer."""
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        self._run("recv" if rank == 0 else "send", byte, nullcontext())

    def close(self) -> None:
        """Aborts an operation in flight and waits until the GPU has left it. After TransferError, try again later."""
        self._closing.set()
        self._abort()
        if not self._operation.acquire(timeout=2 * _ABORT_TIMEOUT_S):
            raise TransferError("NCCL: an operation survived the abort of its communicator")
        try:
            self._group = None
            if self._in_flight is not None and not self._poll(self._in_flight, _ABORT_TIMEOUT_S, threading.Event()):
                raise TransferError(f"NCCL: the GPU is still in an aborted operation {self._abort_failure}".rstrip())
            self._in_flight = None
        except RuntimeError as error:
            raise TransferError(f"NCCL close: {first_line(error)}") from None
        finally:
            self._operation.release()

    def _run(self, what: str, buffer: torch.Tensor, launch_order: AbstractContextManager[object]) -> None:
        with self._operation:
            if self._group is None or self._aborted or self._closing.is_set():
                raise TransferError(f"NCCL {what}: the connection is closed")
            try:
                with launch_order:
                    start = self._group.send if what == "send" else self._group.recv
                    start([buffer], self._peer, _TAG).wait()  # orders the current stream after it, blocks nothing
                    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    done.record()
                self._in_flight = done
                self._watch(done)
                self._in_flight = None
            except (RuntimeError, TransferError) as error:
                self._abort()
                raise TransferError(f"NCCL {what} of {buffer.numel()} bytes: {first_line(error)}") from None

    def _watch(self, done: torch.cuda.Event) -> None:
        """Wait for the operation; past its deadline or on `close`, abort and wait until the GPU has left it."""
        if self._poll(done, self._timeout_s, self._closing):
            return
        self._abort()
        self._poll(done, _ABORT_TIMEOUT_S, threading.Event())
        raise TransferError("closed" if self._closing.is_set() else f"not complete within {self._timeout_s} s")

    @staticmethod
    def _poll(done: torch.cuda.Event, timeout_s: float, stop: threading.Event) -> bool:
        """Whether `done` fired within the time and before `stop`. A CUDA event cannot wake a thread with a deadline."""
        deadline = time.monotonic() + timeout_s
        polls = 0
        while not done.query():  # type: ignore[no-untyped-call]
            polls += 1
            if stop.wait(_SHORT_POLL_S if polls < _SHORT_POLLS else _LONG_POLL_S) or time.monotonic() > deadline:
                return False
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
