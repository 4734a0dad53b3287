"""Stamps at every hop of a chunk through a worker's threads, for whoever wants to know where a hand-over's time goes.

Installed into a worker process of the transfer bench with `--hops`, before its halves are made. Methods are wrapped
from outside, so that the worker's code stays free of it; a stamp costs about a microsecond. The clock is the machine's.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import baton.engine.loop
from baton.worker.frame_stream import FrameStream
from decode_worker.handover import DecodeHalf
from kv_transfer import nccl, receiver, sender
from kv_transfer.device_clock import DeviceClock
from prefill_worker.handover import PrefillHalf

_REMEMBERED = 50_000
_ENGINE = ("_launch", "_land", "_advance", "_report")
_BY_ROLE: dict[str, tuple[tuple[type, tuple[str, ...]], ...]] = {
    "prefill": (
        (PrefillHalf, ("on_segment", "on_prefill_done", "_feed", "_send")),
        (sender.SendLink, ("pack", "start_send", "_start_pack", "_start_send")),
    ),
    "decode": (
        (DecodeHalf, ("_feed", "_admit")),
        (receiver.RecvLink, ("start_recv", "unpack", "_start_recv", "_start_unpack")),
    ),
}
Stamp = tuple[float, str]


class Hops:
    """The latest stamps of this process. `<` begins a method, `>` ends it; `wait` is of a link's thread for an end."""

    def __init__(self, role: str) -> None:
        self._stamps: deque[Stamp] = deque(maxlen=_REMEMBERED)
        for owner, names in (
            *_BY_ROLE[role],
            (baton.engine.loop.Engine, _ENGINE),
            (FrameStream, ("data_received", "send")),
            (nccl.NcclTransport, ("_start",)),
        ):
            for name in names:
                self._wrap(owner, name)
        self._wrap_clock()

    def take(self) -> list[Stamp]:
        """The stamps since the last call, in order."""
        stamps = sorted(self._stamps)
        self._stamps.clear()
        return stamps

    def _note(self, what: str) -> None:
        self._stamps.append((time.monotonic(), what))

    def _wrap(self, owner: type, name: str) -> None:
        call = getattr(owner, name)

        @functools.wraps(call)
        def stamped(*args: Any, **kwargs: Any) -> Any:
            what = f"{owner.__name__}.{name}{_subject(args)}"
            self._note(f"{what} <")
            result = call(*args, **kwargs)
            self._note(f"{what} >")
            return self._stamped_wait(what, result) if callable(result) else result

        setattr(owner, name, stamped)

    def _stamped_wait(self, what: str, wait: Callable[[], Any]) -> Callable[[], Any]:
        def stamped() -> Any:
            self._note(f"{what} wait <")
            result = wait()
            self._note(f"{what} wait >")
            return result

        return stamped

    def _wrap_clock(self) -> None:
        """When the device was done with what a thread has waited for."""
        time_of = DeviceClock.time_of

        @functools.wraps(time_of)
        def stamped(clock: DeviceClock, event: Any) -> float | None:
            at = time_of(clock, event)
            if at is not None:
                self._stamps.append((at, "device"))
            return at

        setattr(DeviceClock, "time_of", stamped)  # noqa: B010 (mypy refuses the plain assignment)


def _subject(args: tuple[Any, ...]) -> str:
    """What a call is about: the kind of event, message or command, and the chunk's number."""
    if len(args) < 2:
        return ""
    subject = getattr(args[1], "message", args[1])
    if isinstance(subject, bytes):
        return f" {len(subject)} bytes"
    seq = getattr(subject, "seq", getattr(args[1], "seq", None))
    name = subject if isinstance(subject, str) else type(subject).__name__
    return f" {name}" if seq is None else f" {name} {seq}"
