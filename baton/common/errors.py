"""Errors that carry what was wrong and what to do, in terms that each front end can translate."""

from __future__ import annotations


class BatonError(Exception):
    """Base of all errors that a client or an operator may see."""


class ConfigError(BatonError):
    """A setting is wrong. `key` names it as in the configuration file, for instance `engine.block_size`."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key


class InvalidRequest(BatonError):
    """The client's request cannot be served as it is. `param` names the field; HTTP 400, gRPC INVALID_ARGUMENT."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFound(InvalidRequest):
    """HTTP 404, gRPC NOT_FOUND."""

    def __init__(self, model: str, served: list[str]) -> None:
        super().__init__(f"model {model!r} is not served here; served: {', '.join(served)}", "model", "model_not_found")


class Overloaded(BatonError):
    """No room now. HTTP 429 with Retry-After, gRPC RESOURCE_EXHAUSTED with RetryInfo."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(BatonError):
    """No worker can take the request, or all attempts failed. HTTP 503, gRPC UNAVAILABLE."""


class DeadlineExceeded(BatonError):
    """The request's deadline passed. HTTP 504, gRPC DEADLINE_EXCEEDED."""
