"""The request body of POST /v1/completions, also the common form of a gRPC request. Strict: "3" and true are no ints.

The prompt, which may be large, is checked here by hand; everything else by pydantic.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SkipValidation, ValidationError
from pydantic_core import from_json

from baton.common.errors import InvalidRequest
from router.json_limits import check_structure
from router.sampling_fields import MAX_TOKENS, NumTop, SamplingFields
from router.unsupported import UnsupportedFields

MAX_PROMPTS: Final = 128
MAX_PROMPT_TOKENS: Final = 2**20

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


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a JSON body. Raises InvalidRequest naming the first wrong or unsupported field."""
    check_structure(body)
    try:
        fields = from_json(body)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", None, "invalid_json") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object", None, "invalid_json")
    return checked(fields)


def checked(fields: Mapping[str, object]) -> CompletionRequest:
    """The same for fields that were read already."""
    known = {name: value for name, value in fields.items() if name in CompletionRequest.model_fields}
    try:
        request = CompletionRequest.model_validate(known)
    except ValidationError as error:
        raise _invalid(error) from None
    check_prompt(request.prompt)
    _check_together(request)
    request._num_ignored_fields = len(fields) - len(known)
    return request


def _check_together(request: CompletionRequest) -> None:
    """What a field may be depends on another one."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("not supported in a stream, where echo with logprobs is", "prompt_logprobs")
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens must be at least 1 without echo", "max_tokens")


def check_prompt(prompt: object) -> None:
    """Raises InvalidRequest."""
    if isinstance(prompt, str) or _are_token_ids(prompt):
        return
    if not isinstance(prompt, list) or not 0 < len(prompt) <= MAX_PROMPTS:
        good = False
    elif isinstance(prompt[0], str):
        good = all(isinstance(item, str) for item in prompt)
    else:
        good = all(map(_are_token_ids, prompt))
    if not good:
        message = f"prompt must be text, a non-empty list of token ids, or a list of 1 to {MAX_PROMPTS} of either"
        raise InvalidRequest(message, "prompt")


def _are_token_ids(value: object) -> bool:
    """A bool is not an int here. An array was checked when it was made."""
    if isinstance(value, array):
        return 0 < len(value) <= MAX_PROMPT_TOKENS
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PROMPT_TOKENS:
        return False
    return set(map(type, value)) == {int} and min(value) >= 0 and max(value) < 2**32


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0])
    if param in UnsupportedFields.model_fields:
        return InvalidRequest(f"{param} is not supported by this server", param, "unsupported_parameter")
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is required", param, "missing_required_parameter")
    return InvalidRequest(f"{param}: {first['msg']}", param)
