"""The transport without us: messages through torch's own process group of two, for comparison in the same run."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore, Store

_TIMEOUT_S = 60.0
_TAG = 0


class RawLink:
    """A pair of its own. Nothing is packed, verified, watched or put in turn; the buffer is one message."""

    def __init__(self, store: Store, name: str, rank: int, host: str, device: torch.device, max_ctas: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._peer = 1 - rank
        self._is_receiver = rank == 0
        keys = PrefixStore(name, store)
        self._group: Any = _nccl(keys, rank, device, max_ctas) if device.type == "cuda" else _gloo(keys, rank, host)
        self._buffer = torch.zeros(1, dtype=torch.uint8, device=device)
        self._pending: Any = None
        self.move(1, 1)

    def move(self, count: int, num_bytes: int) -> float:
        """Seconds until `count` messages have gone to the receiver's memory, launched one after the other."""
        if self._buffer.numel() != num_bytes:
            self._buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        with self._on_device():
            self._start().wait()
            self._settle()
            started = time.monotonic()
            works = [self._start() for _ in range(count)]
            for work in works:
                work.wait()
            self._settle()
        return time.monotonic() - started

    def post(self) -> None:
        """Start one message and return. A receive is then posted and unmatched until the peer does the same."""
        with self._on_device():
            self._pending = self._start()

    def finish(self) -> None:
        """Wait for what `post` started."""
        with self._on_device():
            self._pending.wait()
            self._settle()

    def close(self) -> None:
        if hasattr(self._group, "abort") and self._device.type == "cuda":
            self._group.abort()
        self._group = None

    def _start(self) -> Any:
        start = self._group.recv if self._is_receiver else self._group.send
        return start([self._buffer], self._peer, _TAG)

    def _settle(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _on_device(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _nccl(keys: Store, rank: int, device: torch.device, max_ctas: int) -> Any:
    factory: Any = torch.distributed.ProcessGroupNCCL
    options = factory.Options()
    options._timeout = timedelta(seconds=_TIMEOUT_S)
    options.config.max_ctas = max_ctas
    group = factory(keys, rank, 2, options)
    group.eager_connect_single_device(device)
    return group


def _gloo(keys: Store, rank: int, host: str) -> Any:
    factory: Any = ProcessGroupGloo
    options = factory._Options()
    options._devices = [factory.create_device(hostname=host)]
    options._timeout = timedelta(seconds=_TIMEOUT_S)
    return factory(keys, rank, 2, options)
