"""HTTP/1.1 connections over asyncio, lean enough that the client is not what is measured.

One `ConnectionPool` per run, used from the event loop's thread only. Every piece of a body is handed to the sink with
the time at which the loop received it.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

from baton.common.clock import Clock
from baton.common.errors import ConfigError
from benchmarks.serve.http1 import BadResponse, ResponseReader


class Disconnected(Exception):
    """The connection ended before the response did. `answered`: some bytes of the response had come."""

    def __init__(self, message: str, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


class Sink(Protocol):
    """What takes a response; an exception raised here ends the connection and is raised by `Connection.request`."""

    def on_head(self, status: int, headers: dict[str, str], now: float) -> None: ...

    def on_body(self, body: bytes, now: float) -> None: ...


@dataclass(frozen=True)
class Server:
    """Where the server listens."""

    host: str
    port: int
    tls: bool
    prefix: str
    """Path before `/v1`, without a slash at the end."""

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"


def parse_server(url: str) -> Server:
    """`http://host:port`, with or without `/v1` at the end. Raises ConfigError."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError("URL", f"{url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("URL", f"{url!r} is not an http or https address")
    tls = parts.scheme == "https"
    return Server(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/").removesuffix("/v1"))


class Connection(asyncio.Protocol):
    """One connection, one response at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._reader = ResponseReader()
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self._answered = False

    @property
    def usable(self) -> bool:
        """Open, and with nothing under way."""
        return self._transport is not None and not self._transport.is_closing() and self._sink is None

    async def request(self, data: bytes, sink: Sink) -> None:
        """Send `data`, feed the answer to `sink`, return at its end. Raises Disconnected, BadResponse, or what the
        sink raised; the connection is then closed."""
        if self._transport is None or self._transport.is_closing():
            raise Disconnected("closed before the request was sent", answered=False)
        self._reader, self._sink, self._answered = ResponseReader(), sink, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            await self._done
        finally:
            self._sink = None
            if not (self._reader.complete and self._reader.keep_alive):
                self.abort()

    def abort(self) -> None:
        """Close at once, dropping what is not sent."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = self._clock.now()
        if self._sink is None:
            self.abort()
            return
        self._answered = True
        try:
            self._deliver(self._sink, data, now)
        except Exception as error:  # noqa: BLE001 - handed to the caller of `request`
            self._settle(error)

    def connection_lost(self, exc: Exception | None) -> None:
        reason = str(exc) if exc is not None else "closed by the server"
        self._settle(None if self._reader.close() else Disconnected(reason, self._answered))

    def _deliver(self, sink: Sink, data: bytes, now: float) -> None:
        reader = self._reader
        had_head = reader.status is not None
        body = reader.feed(data)
        if not had_head and reader.status is not None:
            sink.on_head(reader.status, reader.headers, now)
        if body:
            sink.on_body(body, now)
        if reader.complete:
            self._settle(None)

    def _settle(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._sink = None
            self._done.set_exception(error)


class ConnectionPool:
    """Keeps idle connections to one server, the last used first."""

    def __init__(self, server: Server, clock: Clock) -> None:
        self._server = server
        self._clock = clock
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if server.tls else None
        self.opened = 0

    async def request(self, data: bytes, sink: Sink) -> None:
        """As `Connection.request`, over an idle or a new connection. A kept connection that the server closed before it
        answered a single byte is replaced once, as any HTTP client does. Raises OSError when none can be opened."""
        kept = self._take()
        if kept is not None:
            try:
                await self._exchange(kept, data, sink)
            except Disconnected as error:
                if error.answered:
                    raise
            else:
                return
        await self._exchange(await self._open(), data, sink)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self._clock), self._server.host, self._server.port, ssl=self._tls
        )
        self.opened += 1
        return connection

    async def _exchange(self, connection: Connection, data: bytes, sink: Sink) -> None:
        await connection.request(data, sink)
        if connection.usable:
            self._idle.append(connection)


__all__ = ["BadResponse", "Connection", "ConnectionPool", "Disconnected", "Server", "Sink", "parse_server"]
