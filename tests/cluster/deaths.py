"""Where a worker process kills itself: the points of a hand-over at which a peer may vanish. Test processes only."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn, TypeVar

import torch

import kv_transfer.connection
import prefill_worker.handover
from baton.worker.chaos_hooks import NoFaults
from decode_worker.listener import Listener
from kv_transfer.messages import Commit
from kv_transfer.transport import PairTransport, Transfer
from kv_transfer.wire import prefill_frame as to_frame
from prefill_worker.dialer import Dialer
from protos import transfer_pb2

DEATHS = ("connect", "setup", "send", "sending", "commit")
NEVER = "never"
FATAL_CHUNK = 3
T = TypeVar("T")


def die(*_: object, **__: object) -> NoReturn:
    """SIGKILL, and the time of it on the machine's clock as the last word."""
    os.write(sys.stdout.fileno(), f"dying {time.monotonic()}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL cannot be survived")


def arm(death: str) -> NoFaults:
    """Make this process die at one of DEATHS; the injector that its worker shall use.

    `connect`: before any connection, when told to make one or when asked for one. `setup`: both ends are there and the
    other is inside the library's set-up. `send`: a chunk is announced, its operation launched at the other end only.
    `sending`: launched at both. `commit`: everything is sent, the commit is not.
    """
    if death == "connect":
        Dialer.serve_once = die  # type: ignore[method-assign]
        Listener._read_hello = die  # type: ignore[method-assign]
    elif death == "setup":
        for name in ("connect_nccl", "connect_gloo"):
            setattr(kv_transfer.connection, name, die)
    elif death == "commit":
        _die_at_commit()
    return DeadlyInjector(death)


def _die_at_commit() -> None:
    """On prefill instead of sending the first commit; a decode worker dies on reading it, see `DeadlyInjector`."""
    original = to_frame

    def prefill_frame(value: Any, *rest: Any) -> transfer_pb2.PrefillFrame:
        return die() if isinstance(value, Commit) else original(value, *rest)

    setattr(prefill_worker.handover, "prefill_frame", prefill_frame)  # noqa: B010 (mypy: not exported there)


class DeadlyInjector(NoFaults):
    """See `Injector`."""

    def __init__(self, death: str) -> None:
        self._death = death

    def transport(self, transport: PairTransport) -> PairTransport:
        return DeadlyTransport(transport, self._death) if self._death in ("send", "sending") else transport

    def frames(self, frames: AsyncIterator[T]) -> AsyncIterator[T]:
        return _until_commit(frames) if self._death == "commit" else frames


async def _until_commit(frames: AsyncIterator[T]) -> AsyncIterator[T]:
    async for frame in frames:
        if isinstance(frame, transfer_pb2.PrefillFrame) and frame.HasField("commit"):
            die()
        yield frame


class DeadlyTransport:
    """See `PairTransport`: the process ends with the operation of one chunk, before or right after its launch."""

    def __init__(self, transport: PairTransport, death: str) -> None:
        self._transport = transport
        self._death = death
        self._operations = itertools.count(1)

    def start_send(self, buffer: torch.Tensor) -> Transfer:
        is_last = self._before()
        transfer = self._transport.start_send(buffer)
        return die() if is_last else transfer

    def start_recv(self, buffer: torch.Tensor) -> Transfer:
        is_last = self._before()
        transfer = self._transport.start_recv(buffer)
        return die() if is_last else transfer

    def close(self) -> None:
        self._transport.close()

    def _before(self) -> bool:
        is_last = next(self._operations) == FATAL_CHUNK
        if is_last and self._death == "send":
            die()
        return is_last
