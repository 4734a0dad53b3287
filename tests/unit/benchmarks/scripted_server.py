"""A small HTTP server for the client's tests: answers completions as each request's `max_tokens` scripts it.

Runs in the test's event loop on 127.0.0.1:0, or alone (`python -m tests.unit.benchmarks.scripted_server`) to find the
client's own limit.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Exchange:
    """One request as the server saw it, and the way to answer."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    def head(self, status: str = "200 OK", headers: str = "Transfer-Encoding: chunked\r\n") -> None:
        self.writer.write(f"HTTP/1.1 {status}\r\nContent-Type: text/event-stream\r\n{headers}\r\n".encode())

    def event(self, data: object) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        self.chunk(f"data: {text}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    def token(self, text: str = "x", finish: str | None = None, **more: Any) -> None:
        self.event({"id": "cmpl-1", "choices": [{"index": 0, "text": text, "finish_reason": finish}], **more})

    def usage(self, completion: int) -> dict[str, Any]:
        return {"prompt_tokens": len(self.body["prompt"]), "completion_tokens": completion}

    def end(self) -> None:
        self.event("[DONE]")
        self.writer.write(b"0\r\n\r\n")


Script = Callable[[Exchange], Awaitable[None]]


@dataclass
class ScriptedServer:
    """Counts what it was asked; `script` answers every completion."""

    script: Script
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    under_way: int = 0
    most_under_way: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                await self._answer(await _read_request(reader, writer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, exchange: Exchange) -> None:
        if not exchange.path.endswith("/completions"):
            _answer_get(exchange)
            return
        self.bodies.append(exchange.body)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.script(exchange)
        finally:
            self.under_way -= 1


@asynccontextmanager
async def running(script: Script, port: int = 0) -> AsyncIterator[ScriptedServer]:
    """The server, listening until the block ends."""
    scripted = ScriptedServer(script)
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", port, limit=1 << 26)
    scripted.port = server.sockets[0].getsockname()[1]
    try:
        yield scripted
    finally:
        server.close()
        if sys.version_info >= (3, 13):
            server.close_clients()


async def well_behaved(exchange: Exchange) -> None:
    """`max_tokens` tokens, one chunk each, the usage at the end; a turn of the event loop between chunks."""
    count = exchange.body["max_tokens"]
    exchange.head()
    for position in range(count):
        exchange.token(finish="length" if position == count - 1 else None)
        await asyncio.sleep(0)
    exchange.event({"id": "cmpl-1", "choices": [], "usage": exchange.usage(count)})
    exchange.end()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Exchange(lines[0].split(" ")[1], headers, json.loads(body) if body else {}, writer)


def _answer_get(exchange: Exchange) -> None:
    answers: dict[str, Any] = {"/v1/models": {"data": [{"id": "scripted"}]}, "/version": {"version": "1.2.3"}}
    answer = answers.get(exchange.path)
    payload = json.dumps(answer).encode()
    status = "404 Not Found" if answer is None else "200 OK"
    exchange.writer.write(
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
        + payload
    )


async def _alone(port: int) -> None:
    async with running(well_behaved, port) as server:
        print(f"listening on {server.url}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_alone(int(sys.argv[1])))
