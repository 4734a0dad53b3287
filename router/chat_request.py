"""The body of POST /v1/chat/completions without what becomes the prompt, which chat_schema.py has."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from baton.common.errors import InvalidRequest
from router.chat_schema import ChatInput
from router.request_fields import RequestFields
from router.sampling_fields import MAX_TOKENS, NumTop
from router.schema_errors import validated
from router.unsupported import EmptyList, Nothing, Off, UnsupportedFields


class UnsupportedChatFields(UnsupportedFields):
    """Base of the request model: what is said in unsupported.py holds here too."""

    audio: Nothing = None
    echo: Off = None
    function_call: Literal["none", "auto"] | None = None
    functions: EmptyList = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    mm_processor_kwargs: Nothing = None
    moderation: Nothing = None
    prediction: Nothing = None
    prompt_logprobs: Nothing = None
    service_tier: Literal["auto", "default"] | None = None
    store: Off = None
    verbosity: Nothing = None
    web_search_options: Nothing = None


class ChatRequest(RequestFields, UnsupportedChatFields):
    """None stands for the default, as in OpenAI's API. Unknown fields are ignored, and counted.

    `add_special_tokens`: let the tokenizer add its BOS to what the template made; templates write their own.
    """

    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None
    add_special_tokens: bool | None = None  # type: ignore[assignment]
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def num_top(self) -> int | None:
        """How many of the likeliest tokens to report beside each; None: no log-probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ChatBody(ChatInput, ChatRequest):
    """The whole body, for the OpenAPI document."""


def checked_chat(fields: dict[str, object]) -> ChatRequest:
    """Fields that the reader left. Raises InvalidRequest naming the first wrong or unsupported one."""
    request, num_ignored = validated(ChatRequest, fields, UnsupportedChatFields)
    request.accepted(num_ignored)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs is only allowed when logprobs is true", "top_logprobs")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequest("max_tokens is the old name of max_completion_tokens; they differ", "max_tokens")
    return request
