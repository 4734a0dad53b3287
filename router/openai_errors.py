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

_KINDS: tuple[tuple[type[BatonError], int, str], ...] = (
    (ModelNotFound, 404, "invalid_request_error"),
    (InvalidRequest, 400, "invalid_request_error"),
    (Overloaded, 429, "rate_limit_error"),
    (Unavailable, 503, "service_unavailable_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (ReaderTooSlow, 503, "service_unavailable_error"),
    (RequestCancelled, 499, "request_cancelled"),
)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: BatonError) -> tuple[int, dict[str, object]]:
    """HTTP status and body of an error."""
    status, kind = next(((s, k) for cls, s, k in _KINDS if isinstance(error, cls)), (500, "internal_error"))
    param = error.param if isinstance(error, InvalidRequest) else None
    code = error.code if isinstance(error, InvalidRequest) else kind.removesuffix("_error")
    return status, error_body(str(error), kind, param, code)


def error_response(error: BatonError) -> JSONResponse:
    status, body = describe(error)
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return JSONResponse(body, status, headers)


def http_error(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error of HTTP itself: unknown route, wrong method, body too large."""
    kind = "invalid_request_error" if status < 500 else "internal_error"
    return JSONResponse(error_body(message, kind, None, code), status, headers)
