"""KV between CPUs: a two-rank gloo group of one epoch.

Gloo cannot interrupt an operation that waits: `abort` leaves it blocked until the operation timeout, a dead peer ends
it within milliseconds, a stopped peer only at the timeout. After a timeout the pair is closed for good.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import Store

from kv_transfer.transport import PairGroup, TransferError, first_line

_TAG = 0
_CLOSE_MARGIN_S = 1.0


def connect_gloo(
    store: Store, rank: int, host: str, connect_timeout_s: float, operation_timeout_s: float
) -> GlooTransport:
    """Join the group of two whose keys lie in `store`. It listens on `host` only. Raises RuntimeError."""
    factory: Any = ProcessGroupGloo  # its stub lacks what follows
    options = factory._Options()
    options._devices = [factory.create_device(hostname=host)]
    options._timeout = timedelta(seconds=connect_timeout_s)
    return GlooTransport(factory(store, rank, 2, options), 1 - rank, operation_timeout_s)


class GlooTransport:
    """See `PairTransport`. CUDA buffers are copied through host memory, which serves two workers on one GPU.

    Operations are run by whoever waits for one of them, in the order of their start and one at a time.
    """

    def __init__(self, group: PairGroup, peer: int, operation_timeout_s: float) -> None:
        self._group: PairGroup | None = group
        self._peer = peer
        self._timeout_s = operation_timeout_s
        self._closing = threading.Event()
        self._operation = threading.Lock()
        self._started: deque[GlooTransfer] = deque()

    def start_send(self, buffer: torch.Tensor) -> GlooTransfer:
        self._check("send")
        host = buffer.cpu()
        return self._start(lambda: self._run("send", host))

    def start_recv(self, buffer: torch.Tensor) -> GlooTransfer:
        self._check("recv")
        return self._start(lambda: self._recv(buffer))

    def finish(self, transfer: GlooTransfer) -> None:
        """Run what was started up to `transfer`. Raises TransferError, also for each operation after a failed one."""
        with self._operation:
            while not transfer.is_done:
                self._started[0].run()
                self._started.popleft().is_done = True

    def close(self) -> None:
        """Waits for an operation in flight, at most until its timeout."""
        self._closing.set()
        if not self._operation.acquire(timeout=self._timeout_s + _CLOSE_MARGIN_S):
            raise TransferError("gloo: an operation outlived its timeout")
        try:
            # The last reference: its destructor closes the sockets and ends the threads.
            self._group = None
        finally:
            self._operation.release()

    def _recv(self, buffer: torch.Tensor) -> None:
        if buffer.device.type == "cpu":
            self._run("recv", buffer)
            return
        host = torch.empty(buffer.shape, dtype=buffer.dtype)
        self._run("recv", host)
        buffer.copy_(host)

    def _start(self, run: Callable[[], None]) -> GlooTransfer:
        transfer = GlooTransfer(self, run)
        self._started.append(transfer)
        return transfer

    def _check(self, what: str) -> PairGroup:
        if self._group is None or self._closing.is_set():
            raise TransferError(f"gloo {what}: the connection is closed")
        return self._group

    def _run(self, what: str, buffer: torch.Tensor) -> None:
        group = self._check(what)
        try:
            start = group.send if what == "send" else group.recv
            start([buffer], self._peer, _TAG).wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            # Nothing may follow a failed operation: a late message would meet the wrong receive.
            self._group = None
            raise TransferError(f"gloo {what} of {buffer.numel()} bytes: {first_line(error)}") from None


class GlooTransfer:
    """See `Transfer`. `run` is called by the transport, which then sets `is_done`."""

    event = None

    def __init__(self, transport: GlooTransport, run: Callable[[], None]) -> None:
        self._transport = transport
        self.run = run
        self.is_done = False

    def follow(self) -> None:
        self._transport.finish(self)

    def wait(self) -> None:
        self._transport.finish(self)
