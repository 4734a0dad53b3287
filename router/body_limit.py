"""ASGI middleware that refuses a request body over the limit before anybody parses it."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.openai_errors import http_error

_DISCARD_S = 2.0
_DISCARD_BYTES = 128 * 1024 * 1024


class _TooLarge(Exception):
    pass


class BodyLimit:
    """Looks at Content-Length first; a chunked body is counted as it arrives. Answers 413 and closes."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _content_length(scope) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        started = False

        async def tracked_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, self._counted(receive), tracked_send)
        except _TooLarge:
            if not started:
                await self._refuse(scope, receive, send)

    def _counted(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise _TooLarge
            return message

        return counted

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The rest is read and thrown away first, within bounds: a client that still sends would not see the answer.

        One that waits to be told to go on has sent nothing yet, and reading would tell it.
        """
        if not _waits_to_send(scope):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_discard(receive), _DISCARD_S)
        response = http_error(413, f"the body is larger than {self._max_bytes} bytes", "body_too_large")
        response.headers["connection"] = "close"
        await response(scope, receive, send)


async def _discard(receive: Receive) -> None:
    discarded = 0
    while discarded < _DISCARD_BYTES:
        message = await receive()
        discarded += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


def _waits_to_send(scope: Scope) -> bool:
    return any(name == b"expect" and value.lower() == b"100-continue" for name, value in scope["headers"])
