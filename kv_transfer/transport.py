"""What a KV connection can do, whatever carries it, and how its failures are told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Generic, Protocol, TypeVar

import torch
from torch.distributed import Work

from baton.common.errors import BatonError

logger = logging.getLogger(__name__)
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


class BoundedCall(Generic[T]):
    """A call on a thread of its own, that whoever waits for it may give up.

    For calls into a communication library that may block for ever on a stopped peer. The thread is a daemon: one that
    never returns must not keep the process alive. What the call brings after it was given up goes to `discard`, there.
    """

    def __init__(self, call: Callable[[], T], what: str, discard: Callable[[T], None] | None = None) -> None:
        self._call = call
        self._what = what
        self._discard = discard
        self._outcome: Future[T] = Future()
        threading.Thread(target=self._run, name=f"bounded {what}", daemon=True).start()

    def result(self, timeout_s: float | None = None) -> T:
        """From any thread. After `timeout_s` it is given up. RuntimeError and giving up become TransferError."""
        try:
            return self._outcome.result(timeout_s)
        except TimeoutError:
            if not self.give_up():
                return self._outcome.result()
            raise TransferError(f"{self._what}: no result within {timeout_s} s") from None
        except CancelledError:
            raise TransferError(f"{self._what}: given up") from None

    def give_up(self) -> bool:
        """Nobody waits any more: whoever does gets TransferError at once. False when the call has ended before."""
        return self._outcome.cancel()

    def _run(self) -> None:
        try:
            result = self._call()
        except (RuntimeError, TransferError) as error:
            self._fail(TransferError(f"{self._what}: {first_line(error)}"))
        except BaseException as error:  # noqa: BLE001 (whoever waits gets it)
            self._fail(error)
        else:
            if self._outcome.set_running_or_notify_cancel():
                self._outcome.set_result(result)
            elif self._discard is not None:
                self._discard(result)

    def _fail(self, error: BaseException) -> None:
        if self._outcome.set_running_or_notify_cancel():
            self._outcome.set_exception(error)


def run_bounded(call: Callable[[], T], timeout_s: float, what: str, discard: Callable[[T], None] | None = None) -> T:
    """The result of a `BoundedCall`, at most `timeout_s` later. Raises TransferError."""
    return BoundedCall(call, what, discard).result(timeout_s)


def close_late(transport: PairTransport) -> None:
    """Close a connection that came when nobody wanted it any more. It has touched no staging."""
    try:
        transport.close()
    except TransferError as error:
        logger.error("a connection that is not wanted any more could not be closed: %s", error)


def first_line(error: BaseException) -> str:
    """The libraries append stack traces and advice; the first line holds the cause."""
    return (str(error).splitlines() or [type(error).__name__])[0]
