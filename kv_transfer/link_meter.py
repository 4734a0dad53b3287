"""How fast a link carries messages that follow each other without a gap."""

from __future__ import annotations

_FORGOTTEN = 0.2  # of what is known, with each message
_SMALLEST = 1 << 20


class LinkMeter:
    """Fed with each message in order of sending, by one thread; read by any. Small ones say nothing of bandwidth.

    Bytes and seconds are summed apart: a mean of rates is ruled by the messages whose end was seen late.
    """

    def __init__(self) -> None:
        self._last_end: float | None = None
        self._num_bytes = self._seconds = 0.0
        self._bytes_per_s: float | None = None

    @property
    def bytes_per_s(self) -> float | None:
        """None until two messages were under way at once."""
        return self._bytes_per_s

    def add(self, num_bytes: int, started: float, ended: float) -> None:
        """`started`: it was launched. `ended`: it had left, on the same clock."""
        before, self._last_end = self._last_end, ended
        if before is None or started > before or num_bytes < _SMALLEST:
            return
        self._num_bytes += num_bytes - _FORGOTTEN * self._num_bytes
        self._seconds += max(ended - before, 0.0) - _FORGOTTEN * self._seconds
        if self._seconds > 0.0:
            self._bytes_per_s = self._num_bytes / self._seconds
