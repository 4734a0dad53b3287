"""How fast a link carries messages that follow each other without a gap."""

from __future__ import annotations

_SMOOTHING = 0.2
_SMALLEST = 1 << 20


class LinkMeter:
    """Fed with each message in order of sending, by one thread; read by any. Small ones say nothing of bandwidth."""

    def __init__(self) -> None:
        self._last_end: float | None = None
        self._bytes_per_s: float | None = None

    @property
    def bytes_per_s(self) -> float | None:
        """None until two messages were under way at once."""
        return self._bytes_per_s

    def add(self, num_bytes: int, started: float, ended: float) -> None:
        before, self._last_end = self._last_end, ended
        if before is None or started > before or num_bytes < _SMALLEST or ended <= before:
            return
        rate = num_bytes / (ended - before)
        known = self._bytes_per_s
        self._bytes_per_s = rate if known is None else known + _SMOOTHING * (rate - known)
