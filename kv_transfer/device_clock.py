"""When CUDA events fired, on the process' monotonic clock."""

from __future__ import annotations

import threading
import time
from functools import cache

import torch

from kv_transfer import streams

_CALIBRATE_AFTER_S = 5.0  # event differences are 32-bit milliseconds: they lose microseconds within a minute
_TRIES = 5
_TRY_S = 0.002


class DeviceClock:
    """Any thread. Compares events with a reference whose time the host has seen, on a stream taken once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._reference: torch.cuda.Event | None = None
        self._reference_at = 0.0

    def time_of(self, event: torch.cuda.Event) -> float | None:
        """When `event`, which has fired, did so; None when it was made without timing, or nothing can be compared."""
        with self._lock:
            if self._reference is None or time.monotonic() - self._reference_at > _CALIBRATE_AFTER_S:
                self._calibrate()
            if self._reference is None:
                return None
            try:
                since_ms: float = self._reference.elapsed_time(event)
            except RuntimeError:
                return None
            return self._reference_at + since_ms / 1e3

    def _calibrate(self) -> None:
        """The tightest of some tries: the time of an event is known to within what it took to wait for it.

        NCCL may have been handed the same stream by torch, or the device may run this one behind another: a try that
        takes too long is given up, and without any the reference stays.
        """
        if self._stream is None:
            self._stream = streams.take(self._device)
        if not self._stream.query():
            return
        best = float("inf")
        for _ in range(_TRIES):
            event, before = timing_event(), time.monotonic()
            event.record(self._stream)
            while not (fired := event.query()) and time.monotonic() < before + _TRY_S:  # type: ignore[no-untyped-call]
                pass
            if not fired:
                return
            took = time.monotonic() - before
            if took < best:
                best, self._reference, self._reference_at = took, event, before + took / 2


@cache
def clock_of(device: torch.device) -> DeviceClock:
    """The one that this process uses for a device."""
    return DeviceClock(device)


def timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
