"""The HTTP API: OpenAI's completions, and what an operator asks. Built by server.py; every error has OpenAI's form."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from baton.common.errors import BatonError
from router.body_limit import BodyLimit
from router.completions import Choice, Completions, merged
from router.dispatcher import Dispatcher
from router.event_stream import ClientGone, EventStream, unless_gone
from router.health import health, is_ready, workers
from router.openai_errors import describe, error_response, http_error
from router.openai_response import CompletionHead, path_header
from router.openai_schema import CompletionRequest, parse_completion
from router.openapi import COMPLETION_BODY, document
from router.registry import Registry
from router.text import TextDelta

_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CODES = {404: "not_found", 405: "method_not_allowed"}


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers need."""

    completions: Completions
    dispatcher: Dispatcher
    registry: Registry


def build_app(services: Services, max_body_bytes: int) -> FastAPI:
    """All routes. The interactive documentation is off: it loads scripts from elsewhere."""
    app = FastAPI(title="Baton", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_exception_handler(BatonError, _on_baton_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    app.add_exception_handler(Exception, _on_defect)
    _add_completions(app, services)
    _add_requests(app, services)
    _add_operations(app, services)
    app.openapi_schema = document(app)
    return app


def _add_completions(app: FastAPI, services: Services) -> None:
    @app.post("/v1/completions", openapi_extra=COMPLETION_BODY)
    async def completions(request: Request) -> Response:
        body = parse_completion(await request.body())
        choices = await services.completions.start(body)
        try:
            if body.stream:
                return await _stream(request, body, choices)
            return await _whole(request, body, choices)
        except BaseException:
            _close(choices)
            raise

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        card = {
            "id": services.completions.model,
            "object": "model",
            "created": 0,
            "owned_by": "baton",
            "max_model_len": services.completions.max_model_len or None,
        }
        return JSONResponse({"object": "list", "data": [card]})


def _add_requests(app: FastAPI, services: Services) -> None:
    @app.get("/v1/requests/{request_id}")
    async def request_timeline(request_id: str) -> Response:
        """The timeline of a recent request; of one with several prompts, a list with one per prompt."""
        recent = services.dispatcher.recent
        if (record := recent.get(request_id)) is not None:
            return JSONResponse(record.as_dict())
        records = recent.group(request_id)
        if not records:
            return http_error(404, "no recent request has this id", "request_not_found")
        data = [record.as_dict() for record in records]
        return JSONResponse({"id": request_id, "object": "list", "data": data})

    @app.get("/v1/workers")
    async def worker_states() -> JSONResponse:
        return JSONResponse(workers(services.registry))


def _add_operations(app: FastAPI, services: Services) -> None:
    @app.get("/health")
    async def healthy() -> JSONResponse:
        ok, detail = health(services.dispatcher, services.registry)
        return JSONResponse(detail, 200 if ok else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        ok = is_ready(services.dispatcher, services.registry)
        return JSONResponse({"ready": ok}, 200 if ok else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(services.dispatcher.metrics.render(), media_type=CONTENT_TYPE_LATEST)


# ---- answers


async def _whole(request: Request, body: CompletionRequest, choices: list[Choice]) -> Response:
    async def collect() -> list[list[TextDelta]]:
        deltas: list[list[TextDelta]] = [[] for _ in choices]
        async for choice, delta in merged(choices):
            deltas[choice.index].append(delta)
        return deltas

    head = CompletionHead(choices, body.model)
    deltas = await unless_gone(collect(), request.receive)
    content = head.completion(choices, deltas, bool(body.return_token_ids))
    _close(choices)
    return JSONResponse(content, headers=_headers(request, choices))


async def _stream(request: Request, body: CompletionRequest, choices: list[Choice]) -> Response:
    """Headers are sent with the first token, so that whatever fails before it still has its own status."""
    deltas = merged(choices)
    first = await unless_gone(anext(deltas), request.receive)
    events = _events(body, choices, first, deltas)
    return EventStream(events, _headers(request, choices), lambda: _close(choices))


async def _events(
    body: CompletionRequest,
    choices: list[Choice],
    first: tuple[Choice, TextDelta],
    rest: AsyncGenerator[tuple[Choice, TextDelta], None],
) -> AsyncGenerator[str, None]:
    """An error after the first token is an event of its own: the status is already sent."""
    head = CompletionHead(choices, body.model)
    with_ids = bool(body.return_token_ids)
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    try:
        yield _json(head.chunk(*first, with_ids, with_usage))
        async for choice, delta in rest:
            yield _json(head.chunk(choice, delta, with_ids, with_usage))
        if with_usage:
            yield _json(head.usage_chunk(choices))
    except BatonError as error:
        yield _json(describe(error)[1])
    finally:
        _close(choices)
        await rest.aclose()
    yield "[DONE]"


def _headers(request: Request, choices: list[Choice]) -> dict[str, str]:
    headers = {"x-baton-path": path_header(choices)}
    client_id = request.headers.get("x-request-id", "")
    return headers | {"x-request-id": client_id} if _CLIENT_ID.fullmatch(client_id) else headers


def _json(content: dict[str, object]) -> str:
    """ASCII only: clients that split lines as Python does would break at U+0085 or U+2028 inside a text."""
    return json.dumps(content, separators=(",", ":"))


def _close(choices: list[Choice]) -> None:
    for choice in choices:
        choice.close()


# ---- errors


async def _on_baton_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BatonError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return http_error(error.status_code, message, _CODES.get(error.status_code, "http_error"), error.headers)


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    """Nobody reads this; the status is for access logs."""
    return Response(status_code=499)


async def _on_defect(_request: Request, _error: Exception) -> Response:
    return http_error(500, "internal error", "internal_error")
