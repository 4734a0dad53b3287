"""Errors in google.rpc's form: a status code, and details that clients can read. Used by grpc_service.py."""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from grpc_status import rpc_status

from baton.common.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from router.types import ReaderTooSlow, RequestCancelled

_CODES: tuple[tuple[type[BatonError], grpc.StatusCode], ...] = (
    (ModelNotFound, grpc.StatusCode.NOT_FOUND),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (ReaderTooSlow, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (RequestCancelled, grpc.StatusCode.CANCELLED),
)


def code_of(error: BatonError) -> grpc.StatusCode:
    return next((code for cls, code in _CODES if isinstance(error, cls)), grpc.StatusCode.INTERNAL)


def to_status(error: BatonError) -> grpc.Status:
    """Code, message and details; its trailing metadata carries the details."""
    code: int = code_of(error).value[0]
    return rpc_status.to_status(Status(code=code, message=str(error), details=_details(error)))


def _details(error: BatonError) -> list[Any]:
    details: list[Message] = []
    if isinstance(error, InvalidRequest):
        violation = BadRequest.FieldViolation(field=error.param or "", description=str(error))
        details.append(BadRequest(field_violations=[violation]))
    if isinstance(error, Overloaded):
        delay = Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after_s * 1000)))
        details.append(RetryInfo(retry_delay=delay))
    return [_packed(detail) for detail in details]


def _packed(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
