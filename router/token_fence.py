"""Fencing of one attempt's tokens (I8): each output position passes once and in order, whatever arrives.

Pure. The dispatcher makes one per attempt, starting at the first position that no attempt has emitted yet.
"""

from __future__ import annotations

from collections.abc import Sequence


class TokenFence:
    """Positions below `next_position` are repeats and are dropped; positions above it wait for the gap to close.

    A gap is normal on the remote path: decode's first token may overtake the prefill worker's. Positions at or past
    `limit` are never accepted, so what waits is bounded.
    """

    def __init__(self, next_position: int, limit: int) -> None:
        self.next_position = next_position
        self._limit = limit
        self._early: dict[int, int] = {}
        self._end: tuple[int, str] | None = None

    def accept(self, position: int, token_ids: Sequence[int], finish_reason: str) -> tuple[tuple[int, ...], str | None]:
        """Return the tokens that may be forwarded now, and the finish reason once all tokens before it are out."""
        for offset, token_id in enumerate(token_ids):
            if self.next_position <= position + offset < self._limit:
                self._early.setdefault(position + offset, token_id)
        end = position + len(token_ids)
        if finish_reason and self._end is None and self.next_position <= end:
            self._end = (min(end, self._limit), finish_reason)
        return self._release(), self._finish_reason()

    @property
    def num_waiting(self) -> int:
        return len(self._early)

    def _release(self) -> tuple[int, ...]:
        released: list[int] = []
        last = self._limit if self._end is None else self._end[0]
        while self.next_position < last and self.next_position in self._early:
            released.append(self._early.pop(self.next_position))
            self.next_position += 1
        return tuple(released)

    def _finish_reason(self) -> str | None:
        if self._end is not None and self.next_position == self._end[0]:
            return self._end[1]
        return "length" if self.next_position >= self._limit else None
