"""What passes between the front ends (HTTP, gRPC) and the dispatcher: token ids in, token ids out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.common.errors import BatonError
from baton.common.sampling import SamplingParams, TokenLogprobs

Path = Literal["local", "remote"]
FinishReason = Literal["stop", "length"]
_MAX_DIGITS = 4  # of a choice's number; the random part of an id is longer


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, validated, with its seed drawn. `timeout_s` counts from submission."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    timeout_s: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens in order; the last event of a request, and only it, has a `finish_reason`.

    `logprobs`: one per token, if asked for.
    """

    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


def belongs_to(request_id: str, group_id: str) -> bool:
    """Whether a generation is, or is one of those of, the API request `group_id`: see `Submitter.submit`."""
    number = request_id.removeprefix(f"{group_id}-")
    return request_id == group_id or (number != request_id and number.isdecimal() and len(number) <= _MAX_DIGITS)


class RequestCancelled(BatonError):
    """The request was cancelled by its owner. gRPC CANCELLED; over HTTP nobody is left to read it."""


class ReaderTooSlow(BatonError):
    """The client let too many tokens pile up; its request was ended."""
