"""What a KV connection can do, whatever carries it, and how its failures are told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

import torch
from torch.distributed import Work

from baton.common.errors import BatonError

T = TypeVar("T")


class TransferError(BatonError):
    """A transfer or a connection failed; the epoch cannot be used any more. The text says what was going on."""


class Transfer(Protocol):
    """One send or receive under way."""

    @property
    def event(self) -> torch.cuda.Event | None:
        """Fires at its end; None where the host waits for that itself."""
        ...

    def follow(self) -> None:
        """What the caller launches on its current stream from now on comes after the transfer.

        Returns at once where there is an `event`, and a failure then shows in `wait`; else at the transfer's end. From
        any thread; raises as `wait` does.
        """
        ...

    def wait(self) -> None:
        """Returns when the buffer may be reused (send) or holds the data (receive). From any thread.

        Raises TransferError on failure or past the operation timeout.
        """
        ...


class PairTransport(Protocol):
    """One epoch of the connection between a prefill and a decode worker.

    Operations are started by one transfer thread, complete in that order, and may be waited for by others; `close` is
    for any. Buffers are flat, contiguous, uint8, on the transport's device, and both ends must name the same size: gloo
    takes a shorter message silently, and a longer one ends the process.
    """

    def start_send(self, buffer: torch.Tensor) -> Transfer:
        """Launch a send. On CUDA it follows the work on the current stream. Raises TransferError."""
        ...

    def start_recv(self, buffer: torch.Tensor) -> Transfer:
        """Launch a receive. On CUDA it follows the work on the current stream. Raises TransferError."""
        ...

    def close(self) -> None:
        """Destroy the epoch, within a bounded time; idempotent. An operation in flight ends with TransferError.

        When it returns, no operation can touch memory any more. Raises TransferError if that could not be reached.
        """
        ...


class PairGroup(Protocol):
    """What is used of torch's process groups; their stubs lack it, and a CPU build lacks the one for NCCL."""

    def send(self, tensors: Sequence[torch.Tensor], peer: int, tag: int, /) -> Work: ...
    def recv(self, tensors: Sequence[torch.Tensor], peer: int, tag: int, /) -> Work: ...
    def abort(self) -> None: ...


def run_bounded(call: Callable[[], T], timeout_s: float, what: str) -> T:
    """Run `call` on a thread of its own and give up on it after `timeout_s`.

    For calls into a communication library that may block for ever on a stopped peer. RuntimeError becomes
    TransferError. The thread is a daemon: one that never returns must not keep the process alive.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except (RuntimeError, TransferError) as error:
            outcome.set_exception(TransferError(f"{what}: {first_line(error)}"))
        finally:
            if not outcome.done():
                outcome.set_exception(TransferError(f"{what}: ended without a result"))

    threading.Thread(target=run, name=f"bounded {what}", daemon=True).start()
    try:
        return outcome.result(timeout_s)
    except TimeoutError:
        raise TransferError(f"{what}: no result within {timeout_s} s") from None


def first_line(error: BaseException) -> str:
    """The libraries append stack traces and advice; the first line holds the cause."""
    return (str(error).splitlines() or [type(error).__name__])[0]
