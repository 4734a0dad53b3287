"""A connection that is made when it is first used: for pairs beyond those that a worker connects ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from kv_transfer.transport import PairTransport, Transfer, TransferError

_CLOSE_S = 2.0


class LazyTransport:
    """See `PairTransport`. The first operation connects, and both ends start theirs for the same chunk.

    `connect` blocks until the peer's end does the same, and gives up soon once `cancel` is set.
    """

    def __init__(self, connect: Callable[[], PairTransport], cancel: threading.Event) -> None:
        self._connect = connect
        self._cancel = cancel
        self._connecting = threading.Lock()
        self._transport: PairTransport | None = None

    def start_send(self, buffer: torch.Tensor) -> Transfer:
        return self._connected().start_send(buffer)

    def start_recv(self, buffer: torch.Tensor) -> Transfer:
        return self._connected().start_recv(buffer)

    def close(self) -> None:
        """After TransferError, try again later: a set-up that was cancelled has not ended yet."""
        self._cancel.set()
        if not self._connecting.acquire(timeout=_CLOSE_S):
            raise TransferError("a connection is still being made")
        try:
            if self._transport is not None:
                self._transport.close()
        finally:
            self._connecting.release()

    def _connected(self) -> PairTransport:
        with self._connecting:
            if self._cancel.is_set():
                raise TransferError("the connection is closed")
            if self._transport is None:
                self._transport = self._connect()
            return self._transport
