"""Sends one streamed completion and records it. Used from the event loop's thread only; keeps no state per request."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from baton.common.clock import Clock
from benchmarks.serve.chunks import CompletionReader, StreamFault
from benchmarks.serve.connection import ConnectionPool, Disconnected, Server
from benchmarks.serve.http1 import BadResponse
from benchmarks.serve.records import Counting, Failure, RequestRecord
from benchmarks.serve.sse import BadEvents, EventReader
from benchmarks.serve.tokens import TokenIds

_MAX_ERROR_BODY = 4096
PATH_HEADER = "x-baton-path"


@dataclass(frozen=True)
class ApiSettings:
    """What every request asks for beside its prompt."""

    model: str
    temperature: float = 0.0
    ignore_eos: bool = True
    counting: Counting = Counting.CHUNKS
    timeout: float = 600.0
    """Seconds from the start to the end of one request."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More members of the body; they win over the ones above."""


def render_body(api: ApiSettings, prompt: TokenIds, max_tokens: int) -> bytes:
    """The JSON body of one request."""
    body: dict[str, Any] = {
        "model": api.model,
        "prompt": [],
        "max_tokens": max_tokens,
        "temperature": api.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if api.ignore_eos:
        body["ignore_eos"] = True
    if api.counting is Counting.USAGE:
        body["stream_options"]["continuous_usage_stats"] = True
    if api.counting is Counting.TOKEN_IDS:
        body["return_token_ids"] = True
    body |= api.extra
    body["prompt"] = prompt.tolist()
    return json.dumps(body, separators=(",", ":")).encode()


class CompletionClient:
    """Sends completions to one server through one pool."""

    def __init__(
        self, server: Server, pool: ConnectionPool, api: ApiSettings, clock: Clock, api_key: str | None
    ) -> None:
        self._pool = pool
        self._api = api
        self._clock = clock
        self._head = _request_head(server, api_key)
        self.counted_by: set[Counting] = set()
        """How tokens were really counted, over all requests so far."""

    async def complete(self, record: RequestRecord, body: bytes) -> None:
        """Send `body` and fill `record`. A failure is recorded, not raised; only cancellation leaves this method."""
        reader = CompletionReader(record, self._api.counting)
        record.started = self._clock.now()
        deadline = asyncio.timeout(self._api.timeout)
        try:
            async with deadline:
                await self._pool.request(self._head % len(body) + body, _StreamSink(record, reader))
            if record.failure is None:
                reader.close()
        except StreamFault as error:
            _fail(record, error.kind, str(error))
        except Disconnected as error:
            _fail(record, Failure.DISCONNECTED, str(error))
        except BadResponse as error:
            _fail(record, Failure.BAD_HTTP, str(error))
        except BadEvents as error:
            _fail(record, Failure.BAD_EVENTS, str(error))
        except OSError as error:  # The deadline's TimeoutError is one, as is a connection attempt that timed out.
            expired = deadline.expired()
            message = f"no end after {self._api.timeout:g} s" if expired else str(error)
            _fail(record, Failure.TIMEOUT if expired else Failure.CONNECT, message)
        finally:
            record.ended = self._clock.now()
        self.counted_by |= reader.counted_by


class _StreamSink:
    """Takes the response of one request: events of a 200, the text of anything else."""

    def __init__(self, record: RequestRecord, reader: CompletionReader) -> None:
        self._record = record
        self._reader = reader
        self._events = EventReader()
        self._error_body = b""

    def on_head(self, status: int, headers: dict[str, str], now: float) -> None:  # noqa: ARG002
        self._record.status = status
        self._record.path = _path(headers.get(PATH_HEADER))
        if status != 200:
            _fail(self._record, f"http_{status}", "")

    def on_body(self, body: bytes, now: float) -> None:
        if self._record.status != 200:
            self._error_body = (self._error_body + body)[:_MAX_ERROR_BODY]
            self._record.message = self._error_body.decode("utf-8", "replace")
            return
        for payload in self._events.feed(body):
            self._reader.feed(payload, now)


def _path(header: str | None) -> str | None:
    """The path alone: behind it stands why it was taken, which differs from request to request."""
    return None if header is None else header.partition(";")[0].strip()


def _fail(record: RequestRecord, kind: str, message: str) -> None:
    record.failure = str(kind)
    record.message = message


def _request_head(server: Server, api_key: str | None) -> bytes:
    """Everything up to the body; `%d` stands for the body's length."""
    host = server.url.split("//", 1)[1].removesuffix(server.prefix)
    lines = [
        f"POST {server.prefix}/v1/completions HTTP/1.1",
        f"Host: {host}",
        "Accept: text/event-stream",
        "Content-Type: application/json",
    ]
    if api_key:
        lines.append(f"Authorization: Bearer {api_key}")
    text = "\r\n".join(lines).replace("%", "%%") + "\r\nContent-Length: %d\r\n\r\n"
    return text.encode("latin-1")
