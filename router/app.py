"""The HTTP API: OpenAI's completions, and what an operator asks. Built by server.py; every error has OpenAI's form."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from baton.common.errors import BatonError
from router.answers import respond
from router.api_answers import CompletionAnswerBody, ModelList, Readiness, Report, Timeline
from router.body_limit import BodyLimit
from router.chat import Chat
from router.chat_routes import add_chat, add_tokenize
from router.choice import Choice
from router.completion_answer import CompletionAnswer
from router.completions import Completions
from router.dispatcher import Dispatcher
from router.event_stream import ClientGone, unless_gone
from router.health import health, is_ready, workers
from router.openai_errors import error_response, http_error
from router.openai_schema import CompletionRequest, checked
from router.openapi import Document
from router.reader.pool import RequestReader
from router.registry import Registry
from router.submitter import Submitter
from router.tokenize import TokenizeService

_CODES = {404: "not_found", 405: "method_not_allowed"}


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers need."""

    reader: RequestReader
    submitter: Submitter
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
    document = Document()
    _add_completions(app, document, services)
    add_chat(app, document, Chat(services.submitter, services.reader), services.submitter.tokenizer)
    add_tokenize(app, document, TokenizeService(services.submitter, services.reader))
    _add_requests(app, document, services)
    _add_operations(app, document, services)
    app.openapi_schema = document.finish(app)
    return app


def _add_completions(app: FastAPI, document: Document, services: Services) -> None:
    @app.post("/v1/completions", **document.generation(CompletionRequest, CompletionAnswerBody))
    async def completions(request: Request) -> Response:
        body, choices = await unless_gone(_start(services, await request.body()), request.receive)
        answer = CompletionAnswer(body, choices, services.submitter.tokenizer)
        return await respond(request, answer, stream=bool(body.stream))

    @app.get("/v1/models", **document.get(ModelList))
    async def models() -> JSONResponse:
        card = {
            "id": services.submitter.model,
            "object": "model",
            "created": 0,
            "owned_by": "baton",
            "sampling_defaults": services.submitter.defaults.model_dump(),
            "max_model_len": services.submitter.max_model_len or None,
        }
        return JSONResponse({"object": "list", "data": [card]})


async def _start(services: Services, content: bytes) -> tuple[CompletionRequest, list[Choice]]:
    read = await services.reader.completion(content)
    body = checked({**read.fields, "prompt": read.prompt})
    return body, await services.completions.start(body)


def _add_requests(app: FastAPI, document: Document, services: Services) -> None:
    @app.get("/v1/requests/{request_id}", **document.get(Timeline, 404))
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

    @app.get("/v1/workers", **document.get(Report))
    async def worker_states() -> JSONResponse:
        return JSONResponse(workers(services.registry, services.dispatcher.clock.now()))


def _add_operations(app: FastAPI, document: Document, services: Services) -> None:
    @app.get("/health", **document.status(Report))
    async def healthy() -> JSONResponse:
        ok, detail = health(services.dispatcher, services.registry)
        return JSONResponse(detail, 200 if ok else 503)

    @app.get("/ready", **document.status(Readiness))
    async def ready() -> JSONResponse:
        ok = is_ready(services.dispatcher, services.registry)
        return JSONResponse({"ready": ok}, 200 if ok else 503)

    @app.get("/metrics", **document.text("text/plain"))
    async def metrics() -> Response:
        return Response(services.dispatcher.metrics.render(), media_type=CONTENT_TYPE_LATEST)


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
