"""uvicorn's h11 protocol with bounds on what one turn of the event loop may spend on what a client sends.

h11 is pure Python and takes some ten microseconds per line: a packet full of chunks of one byte would stop the loop for
seconds. Such packets are fed in slices, one per turn. Used by server.py.
"""

from __future__ import annotations

import asyncio
import json
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from router.openai_errors import error_body

_SLICE: Final = 2048  # bytes: at most 341 chunks
_MAX_LINES: Final = 64
_DISCARD_S: Final = 2.0


class BoundedH11Protocol(H11Protocol):
    """One connection. `_pending` is bounded: while it holds anything, nothing is read from the socket."""

    _pending = b""
    _refused = False

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._pending:
            self._pending += data
        elif data.count(b"\n") <= _MAX_LINES:
            super().data_received(data)
        else:
            self._pending = data
            self._feed()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pending = b""
        super().connection_lost(exc)

    def _feed(self) -> None:
        if not self._pending or self.transport.is_closing():
            return
        self.transport.pause_reading()
        piece, self._pending = self._pending[:_SLICE], self._pending[_SLICE:]
        super().data_received(piece)
        if self._refused:
            self._pending = b""
            self.transport.resume_reading()
        elif self._pending:
            asyncio.get_running_loop().call_soon(self._feed)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused in the API's form, if an answer has not begun.

        What the client still sends is read and dropped for a while: it would not see the answer otherwise.
        """
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        content = json.dumps(error_body(msg, "invalid_request_error", None, "invalid_http")).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write_eof()
        asyncio.get_running_loop().call_later(_DISCARD_S, self.transport.close)
