"""From running choices to an HTTP answer: whole, or as a stream of events. Shared by the endpoints."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import Protocol

from fastapi import Request, Response

from baton.common.errors import BatonError
from router.choice import Choice, merged, total_usage
from router.event_stream import EventStream, unless_gone
from router.json_pieces import dumps, encode
from router.openai_errors import describe
from router.request_fields import StreamOptions
from router.text import TextDelta

_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
Content = dict[str, object]


class Answer(Protocol):
    """How an endpoint words what its choices say. One per request."""

    @property
    def choices(self) -> list[Choice]: ...

    @property
    def is_heavy(self) -> bool:
        """Whether a chunk of the stream may be large."""
        ...

    async def chunk(self, choice: Choice, delta: TextDelta) -> Content:
        """One event of a stream. Called with all deltas of all choices, those of each choice in order."""
        ...

    def last_chunk(self) -> Content | None:
        """One more event behind all others, if there is one."""
        ...

    async def whole(self, deltas: list[list[TextDelta]]) -> Content:
        """The whole answer; `deltas[i]` are all deltas of `choices[i]`."""
        ...


def with_usage(content: Content, options: StreamOptions, choices: list[Choice]) -> Content:
    """A chunk with the usage so far where that is asked for, or with a null where it comes behind all chunks only."""
    if not options.include_usage:
        return content
    return content | {"usage": total_usage(choices).as_dict() if options.continuous_usage_stats else None}


async def respond(request: Request, answer: Answer, stream: bool) -> Response:
    """The response; the choices are closed when it is out, or when it cannot be. The request's body has been read."""
    try:
        return await (_stream(request, answer) if stream else _whole(request, answer))
    except BaseException:
        close(answer.choices)
        raise


def close(choices: list[Choice]) -> None:
    for choice in choices:
        choice.close()


async def _whole(request: Request, answer: Answer) -> Response:
    async def collect() -> list[list[TextDelta]]:
        deltas: list[list[TextDelta]] = [[] for _ in answer.choices]
        async for choice, delta in merged(answer.choices):
            deltas[choice.index].append(delta)
        return deltas

    deltas = await unless_gone(collect(), request.receive)
    close(answer.choices)
    content = await encode(await answer.whole(deltas))
    return Response(content, media_type="application/json", headers=_headers(request, answer.choices))


async def _stream(request: Request, answer: Answer) -> Response:
    """Headers are sent with the first token, so that whatever fails before it still has its own status."""
    deltas = merged(answer.choices)
    first = await unless_gone(anext(deltas), request.receive)
    events = _events(answer, first, deltas)
    return EventStream(events, _headers(request, answer.choices), lambda: close(answer.choices))


async def _events(
    answer: Answer, first: tuple[Choice, TextDelta], rest: AsyncGenerator[tuple[Choice, TextDelta], None]
) -> AsyncGenerator[str, None]:
    """An error after the first token is an event of its own: the status is already sent."""
    try:
        yield await _event(answer, *first)
        async for choice, delta in rest:
            yield await _event(answer, choice, delta)
        if (last := answer.last_chunk()) is not None:
            yield dumps(last)
    except BatonError as error:
        yield dumps(describe(error)[1])
    finally:
        close(answer.choices)
        await rest.aclose()
    yield "[DONE]"


async def _event(answer: Answer, choice: Choice, delta: TextDelta) -> str:
    content = await answer.chunk(choice, delta)
    return await encode(content) if answer.is_heavy else dumps(content)


def path_header(choices: list[Choice]) -> str:
    """The path and why, for `x-baton-path`; of several choices each distinct one."""
    paths = list(dict.fromkeys(choice.path for choice in choices))
    return " ".join(" | ".join(paths).split()).encode("ascii", "replace").decode()


def _headers(request: Request, choices: list[Choice]) -> dict[str, str]:
    headers = {"x-baton-path": path_header(choices)}
    client_id = request.headers.get("x-request-id", "")
    return headers | {"x-request-id": client_id} if _CLIENT_ID.fullmatch(client_id) else headers
