"""When CUDA events fired, on the process' monotonic clock."""

from __future__ import annotations

import time

import torch

_CALIBRATE_AFTER_S = 5.0  # event differences are 32-bit milliseconds: they lose microseconds within a minute


class DeviceClock:
    """One thread at a time. Compares events with a reference whose time the host has seen."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reference: torch.cuda.Event | None = None
        self._reference_at = 0.0

    def time_of(self, event: torch.cuda.Event) -> float | None:
        """When `event`, which has fired, did so; None when it was made without timing."""
        reference = self._calibrated()
        try:
            since_ms: float = reference.elapsed_time(event)
            return self._reference_at + since_ms / 1e3
        except RuntimeError:
            return None

    def _calibrated(self) -> torch.cuda.Event:
        if self._reference is None or time.monotonic() - self._reference_at > _CALIBRATE_AFTER_S:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            reference = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            reference.record(stream)
            reference.synchronize()
            self._reference, self._reference_at = reference, time.monotonic()
        return self._reference
