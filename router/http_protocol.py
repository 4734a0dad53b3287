"""uvicorn's h11 protocol with bounds on what a client may cost: turns of the event loop, and what it does not read.

h11 is pure Python and takes some ten microseconds per line: a packet full of chunks of one byte would stop the loop for
seconds. Such packets are fed in slices, one per turn. A request must be whole REQUEST_S after its first byte, and that
must come REQUEST_S after the connection. A client that takes nothing of a full buffer for STALLED_CLIENT_S is cut off.
Used by server.py.
"""

from __future__ import annotations

import asyncio
import json
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from router.openai_errors import error_body

REQUEST_S = 60.0
STALLED_CLIENT_S = 30.0
_SLICE: Final = 2048  # bytes: at most 341 chunks
_MAX_LINES: Final = 64
_DISCARD_S: Final = 2.0


class BoundedH11Protocol(H11Protocol):
    """One connection. `_pending` is bounded: while it holds anything, nothing is read from the socket."""

    _pending = b""
    _refused = False
    _unsent = 0
    _stall_check: asyncio.TimerHandle | None = None
    _request_check: asyncio.TimerHandle | None = None
    _has_begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_request()

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
            return
        self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pending = b""
        self._stop_stall_check()
        self._stop_request_check()
        super().connection_lost(exc)

    def _watch_request(self) -> None:
        """While a request is to come, or to be completed, its time runs; it runs anew from the first byte."""
        if not self._is_incomplete:
            self._stop_request_check()
            return
        has_begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if has_begun and not self._has_begun:
            self._stop_request_check()
        self._has_begun = has_begun
        if self._request_check is None:
            self._request_check = asyncio.get_running_loop().call_later(REQUEST_S, self._give_up_request)

    @property
    def _is_incomplete(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _give_up_request(self) -> None:
        """A connection on which nothing was said is closed without a word."""
        self._request_check = None
        if not self._is_incomplete:
            return
        if self._has_begun:
            self._refuse(408, f"the request was not whole after {REQUEST_S:g} s", "request_timeout")
        else:
            self.transport.close()

    def _stop_request_check(self) -> None:
        self._has_begun = False
        if self._request_check is not None:
            self._request_check.cancel()
            self._request_check = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_stall_check()

    def resume_writing(self) -> None:
        self._stop_stall_check()
        super().resume_writing()

    def _start_stall_check(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._stall_check = asyncio.get_running_loop().call_later(STALLED_CLIENT_S, self._check_stall)

    def _stop_stall_check(self) -> None:
        if self._stall_check is not None:
            self._stall_check.cancel()
            self._stall_check = None

    def _check_stall(self) -> None:
        """Abort, since closing would wait for the client to read what is buffered."""
        if self.transport.get_write_buffer_size() < self._unsent:
            self._start_stall_check()
        else:
            self.transport.abort()

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
        self._watch_request()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg, "invalid_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """What is no whole HTTP request is refused in the API's form, if an answer has not begun.

        What the client still sends is read and dropped for a while: it would not see the answer otherwise.
        """
        if self._refused or self.transport.is_closing():
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        content = json.dumps(error_body(message, "invalid_request_error", None, code)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write_eof()
        asyncio.get_running_loop().call_later(_DISCARD_S, self.transport.close)
