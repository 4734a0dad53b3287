"""What happened to each request: plain data, filled by the client, read by metrics, report and plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Failure(StrEnum):
    """Why a request has no valid answer. An HTTP error status is `http_` and its number instead."""

    CONNECT = "connect_error"
    DISCONNECTED = "disconnected"
    BAD_HTTP = "malformed_http"
    BAD_EVENTS = "malformed_sse"
    SERVER_ERROR = "server_error_event"
    INCOMPLETE = "incomplete_stream"
    NO_TOKENS = "no_tokens"
    TIMEOUT = "timeout"


class Counting(StrEnum):
    """Where the number of tokens of a chunk comes from."""

    USAGE = "usage"
    """`usage.completion_tokens` in every chunk (`stream_options.continuous_usage_stats`)."""
    TOKEN_IDS = "token_ids"
    """`choices[0].token_ids` (`return_token_ids`)."""
    CHUNKS = "chunks"
    """One token a chunk; the total still comes from the usage of the last chunk, where the server sends it."""


@dataclass
class RequestRecord:
    """One request. Times are seconds of the run's clock; `chunk_times[i]` is when `chunk_tokens[i]` tokens arrived."""

    index: int
    input_length: int
    max_tokens: int
    scheduled: float | None = None
    """When an open loop had to send it."""
    started: float = 0.0
    """When the client began: the start of TTFT and of the end-to-end time. Opening a connection is part of both."""
    ended: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    output_tokens: int = 0
    """As the server counts, where it does; otherwise the sum of `chunk_tokens`."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    request_id: str | None = None
    path: str | None = None
    """The `x-baton-path` header."""
    status: int | None = None
    failure: str | None = None
    message: str | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None


@dataclass(frozen=True)
class Run:
    """One measured run: all its requests, and how well the client itself kept up."""

    records: list[RequestRecord]
    started: float
    ended: float
    offered_rate: float | None
    """Requests per second of the arrivals that were drawn; None for a closed loop, or when all are sent at once."""
    loop_delays: list[float]
    """Seconds that the client's event loop was late, sampled; bounds the error of every time stamp."""
    cpu_seconds: float
    connections: int = 0
    """Connections that this run opened."""
