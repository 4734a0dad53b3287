"""A connection that is made when it is first used: for pairs beyond those that a worker connects ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from kv_transfer.transport import BoundedCall, PairTransport, Transfer, TransferError, close_late


class LazyTransport:
    """See `PairTransport`. The first operation connects, and both ends start theirs for the same chunk.

    `connect` blocks until the peer's end does the same, and is told by `cancel` that nobody waits any more. NCCL does
    not listen to that once it has begun, so `close` waits for no set-up: until that ends nothing of it knows a slot,
    and what it still brings is closed.
    """

    def __init__(self, connect: Callable[[], PairTransport], cancel: threading.Event) -> None:
        self._connect = connect
        self._cancel = cancel
        self._lock = threading.Lock()
        self._connecting: BoundedCall[PairTransport] | None = None

    def start_send(self, buffer: torch.Tensor) -> Transfer:
        return self._connected().start_send(buffer)

    def start_recv(self, buffer: torch.Tensor) -> Transfer:
        return self._connected().start_recv(buffer)

    def close(self) -> None:
        with self._lock:
            self._cancel.set()
            connecting = self._connecting
        if connecting is None or connecting.give_up():
            return
        try:
            transport = connecting.result()
        except Exception:  # noqa: BLE001 (the operation that connected has reported it)
            return
        transport.close()

    def _connected(self) -> PairTransport:
        with self._lock:
            if self._cancel.is_set():
                raise TransferError("the connection is closed")
            if self._connecting is None:
                self._connecting = BoundedCall(self._connect, "connect when used", close_late)
            connecting = self._connecting
        return connecting.result()
