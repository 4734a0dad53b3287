"""An incremental reader of server-sent events without I/O: body bytes in, `data` payloads out."""

from __future__ import annotations

_MAX_EVENT = 64 * 1024 * 1024


class BadEvents(Exception):
    """The body is not a stream of server-sent events."""


class EventReader:
    """Reads the events of one response; comments and fields other than `data` are skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        """The payloads of the events that `body` completes. Raises BadEvents."""
        lines = (self._rest + body).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _MAX_EVENT:
            raise BadEvents(f"a line is over {_MAX_EVENT} bytes")
        payloads: list[bytes] = []
        for line in lines:
            self._read_line(line.removesuffix(b"\r"), payloads)
        return payloads

    @property
    def pending(self) -> bool:
        """An event has begun and is not complete."""
        return bool(self._rest.strip()) or bool(self._data)

    def _read_line(self, line: bytes, payloads: list[bytes]) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif not line and self._data:
            payloads.append(b"\n".join(self._data))
            self._data = []
        elif line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
            raise BadEvents(f"not a line of an event stream: {line[:64]!r}")
