"""The request body of POST /v1/completions, also the common form of a gRPC request. Strict: "3" and true are no ints.

The prompt, which may be large, is checked by prompt_shape.py; everything else by pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, SkipValidation

from baton.common.errors import InvalidRequest
from router.prompt_shape import check_prompt
from router.request_fields import RequestFields
from router.sampling_fields import MAX_TOKENS, NumTop
from router.schema_errors import validated
from router.unsupported import UnsupportedFields

Prompt = str | list[int] | list[str] | list[list[int]]
Prompts = Sequence[str] | Sequence[Sequence[int]]


class CompletionRequest(RequestFields, UnsupportedFields):
    """None stands for the default, as in OpenAI's API. Unknown fields are ignored, and counted.

    Sizes against the model are checked in submitter.py.
    """

    prompt: SkipValidation[Prompt]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: NumTop | None = None
    prompt_logprobs: NumTop | None = None
    echo: bool | None = None

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
    request.accepted(num_ignored)
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens must be at least 1 without echo", "max_tokens")
    return request
