"""An incremental HTTP/1.1 response reader without I/O: bytes in, body bytes out.

`Connection` feeds it; one reader per response. It knows the three framings that servers use for answers: chunked,
Content-Length, and until the connection closes.
"""

from __future__ import annotations

_MAX_HEAD = 64 * 1024
_MAX_CHUNK_LINE = 4096


class BadResponse(Exception):
    """The peer does not speak HTTP/1.1 as this reader understands it. The connection must be closed."""


class ResponseReader:
    """Reads one response. After `feed`: `status` and `headers` once the head is complete, `complete` at the end."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.complete = False
        self.keep_alive = False
        self._buffer = bytearray()
        self._chunked = False
        self._remaining: int | None = None
        """Body bytes to come: of this chunk, with its line end, or of Content-Length. None: unknown, or no chunk."""
        self._in_trailer = False

    def feed(self, data: bytes) -> bytes:
        """Body bytes that `data` completes. Raises BadResponse."""
        self._buffer += data
        if self.status is None and not self._read_head():
            return b""
        if self._chunked:
            return self._read_chunks()
        return self._read_plain()

    def close(self) -> bool:
        """The peer closed: True if that ends the response well."""
        if self.status is not None and not self._chunked and self._remaining is None:
            self.complete = True
        return self.complete

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD:
                raise BadResponse(f"response head is over {_MAX_HEAD} bytes")
            return False
        lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        status = _parse_status(lines[0])
        if 100 <= status < 200:  # An interim answer; the real head follows.
            return self._read_head()
        self.status = status
        self.headers = _parse_headers(lines[1:])
        self._set_framing(lines[0])
        return True

    def _set_framing(self, status_line: str) -> None:
        persistent = status_line.startswith("HTTP/1.1") and self.headers.get("connection", "").lower() != "close"
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            length, self._chunked = "0", False
        if not self._chunked and length is not None:
            if not length.isascii() or not length.isdigit():
                raise BadResponse(f"Content-Length is {length!r}")
            self._remaining = int(length)
        self.keep_alive = persistent and (self._chunked or length is not None)

    def _read_plain(self) -> bytes:
        body = bytes(self._buffer if self._remaining is None else self._buffer[: self._remaining])
        del self._buffer[: len(body)]
        if self._remaining is not None:
            self._remaining -= len(body)
            if self._remaining == 0:
                self._finish()
        return body

    def _read_chunks(self) -> bytes:
        buffer, body = self._buffer, bytearray()
        while not self.complete:
            if self._in_trailer:
                if not self._read_trailer_line():
                    break
            elif self._remaining is None:
                size = self._read_chunk_size()
                if size is None:
                    break
                self._in_trailer = size == 0
                self._remaining = size + 2 if size else None
            else:
                take = min(self._remaining, len(buffer))
                body += buffer[: min(take, max(self._remaining - 2, 0))]
                if take == self._remaining and not buffer.startswith(b"\r\n", max(take - 2, 0)) and take >= 2:
                    raise BadResponse("a chunk is not followed by a line end")
                del buffer[:take]
                self._remaining = self._remaining - take or None
                if self._remaining is not None:
                    break
        return bytes(body)

    def _read_chunk_size(self) -> int | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_CHUNK_LINE:
                raise BadResponse("chunk size line is too long")
            return None
        text = bytes(self._buffer[:end]).split(b";", 1)[0].strip()
        if not text or any(byte not in b"0123456789abcdefABCDEF" for byte in text):
            raise BadResponse(f"chunk size is {text[:32]!r}")
        del self._buffer[: end + 2]
        return int(text, 16)

    def _read_trailer_line(self) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD:
                raise BadResponse("trailer is too long")
            return False
        del self._buffer[: end + 2]
        if end == 0:
            self._finish()
        return True

    def _finish(self) -> None:
        self.complete = True
        if self._buffer:  # Nothing was asked for that these bytes could answer.
            self.keep_alive = False


def _parse_status(line: str) -> int:
    parts = line.split(" ", 2)
    if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not (parts[1].isascii() and parts[1].isdigit()):
        raise BadResponse(f"status line is {line[:64]!r}")
    return int(parts[1])


def _parse_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name:
            raise BadResponse(f"header line is {line[:64]!r}")
        headers[name.strip().lower()] = value.strip()
    return headers
