"""Stop strings over text that arrives in pieces. Pure; one instance per output; used by text.py."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back the end of the text while it could be the beginning of a stop string. Nothing behind a stop string
    ever comes out, nor the stop string itself unless it is to be included.
    """

    def __init__(self, stops: Sequence[str], *, included: bool = False) -> None:
        self.found: str | None = None  # the stop string that ended the output
        self._stops = [stop for stop in stops if stop]
        self._included = included
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; return what is safe to emit, and whether a stop string ended the output."""
        if not self._stops:
            return text, False
        self._held += text
        found = [(at, stop) for at, stop in ((self._held.find(stop), stop) for stop in self._stops) if at >= 0]
        if found:
            at, self.found = min(found, key=lambda place: place[0])
            end = at + len(self.found) if self._included else at
            safe, self._held = self._held[:end], ""
            return safe, True
        keep = self._longest_partial()
        safe, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return safe, False

    def flush(self) -> str:
        """The output ended without a stop string: what was held back is text after all."""
        text, self._held = self._held, ""
        return text

    def _longest_partial(self) -> int:
        """Length of the longest end of the held text with which some stop string begins."""
        longest = min(max(len(stop) for stop in self._stops) - 1, len(self._held))
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
