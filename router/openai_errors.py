"""Errors in OpenAI's form, and the status that goes with each. Used by app.py and body_limit.py."""

from __future__ import annotations

import math
from collections.abc import Mapping

from starlette.responses import JSONResponse

from baton.common.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from router.types import ReaderTooSlow, RequestCancelled

_KINDS: tuple[tuple[type[BatonError], int, str, str], ...] = (
    (Overloaded, 429, "rate_limit_error", "rate_limit_exceeded"),
    (Unavailable, 503, "server_error", "service_unavailable"),
    (DeadlineExceeded, 504, "server_error", "timeout"),
    (ReaderTooSlow, 503, "server_error", "reader_too_slow"),
    (RequestCancelled, 499, "invalid_request_error", "request_cancelled"),
    (BatonError, 500, "server_error", "internal_error"),
)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: BatonError) -> tuple[int, dict[str, object]]:
    """HTTP status and body of an error."""
    if isinstance(error, InvalidRequest):
        status = 404 if isinstance(error, ModelNotFound) else 400
        return status, error_body(str(error), "invalid_request_error", error.param, error.code)
    status, kind, code = next(known[1:] for known in _KINDS if isinstance(error, known[0]))
    return status, error_body(str(error), kind, None, code)


def error_response(error: BatonError) -> JSONResponse:
    status, body = describe(error)
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return JSONResponse(body, status, headers)


def http_error(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error of HTTP itself: unknown route, wrong method, body too large."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(error_body(message, kind, None, code), status, headers)
