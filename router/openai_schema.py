"""The request body of POST /v1/completions, also the common form of a gRPC request. Strict: "3" and true are no ints.

The prompt, which may be large, is checked by prompt_shape.py; everything else by pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SkipValidation

from baton.common.errors import InvalidRequest
from router.prompt_shape import check_prompt
from router.sampling_fields import MAX_TOKENS, NumTop, SamplingFields
from router.schema_errors import validated
from router.unsupported import UnsupportedFields

Prompt = str | list[int] | list[str] | list[list[int]]
Prompts = Sequence[str] | Sequence[Sequence[int]]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class CompletionRequest(SamplingFields, UnsupportedFields):
    """None stands for the default, as in OpenAI's API. Unknown fields are ignored.

    Sizes against the model are checked in submitter.py.
    """

    model: str
    prompt: SkipValidation[Prompt]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: NumTop | None = None
    prompt_logprobs: NumTop | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None
    _num_ignored_fields: int = PrivateAttr(0)

    @property
    def num_ignored_fields(self) -> int:
        return self._num_ignored_fields

    @property
    def prompts(self) -> Prompts:
        """One entry per choice of the answer."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


def checked(fields: Mapping[str, object]) -> CompletionRequest:
    """Fields as reader/pool.py or gRPC gives them. Raises InvalidRequest naming the first wrong or unsupported one."""
    request, num_ignored = validated(CompletionRequest, fields, UnsupportedFields)
    check_prompt(request.prompt)
    _check_together(request)
    request._num_ignored_fields = num_ignored
    return request


def _check_together(request: CompletionRequest) -> None:
    """What a field may be depends on another one."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("not supported in a stream, where echo with logprobs is", "prompt_logprobs")
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens must be at least 1 without echo", "max_tokens")
