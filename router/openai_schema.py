"""The request body of POST /v1/completions, also the common form of a gRPC request. Strict: "3" and true are no ints.

A field that would change the answer and is not supported is refused by name; any other unknown field is ignored and
counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from baton.common.errors import InvalidRequest

MAX_PROMPTS: Final = 128
MAX_STOP_STRINGS: Final = 4
_MAX_STOP_LENGTH: Final = 1024
_MAX_TOKENS: Final = 2**31 - 1
_MAX_TEMPERATURE: Final = 100.0

# Values with which an unsupported field changes nothing. Everything else in it is refused.
UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "add_special_tokens": (True,),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "cache_salt": (None,),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "logits_processors": (None, []),
    "logprobs": (None,),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "return_tokens_as_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "stop_token_ids": (None, []),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]


def _prompt_kind(value: object) -> str:
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, list):
        return "text"
    if isinstance(first, str):
        return "texts"
    return "token_id_lists" if isinstance(first, list) else "token_ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenIds, Tag("token_ids")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS), Tag("token_id_lists")],
    Discriminator(_prompt_kind),
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """None stands for the default, as in OpenAI's API. Sizes against the model are checked in completions.py."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=_MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    user: str | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per choice of the answer."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]

    @property
    def num_ignored_fields(self) -> int:
        return sum(name not in UNSUPPORTED for name in self.model_extra or {})


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a JSON body. Raises InvalidRequest naming the first wrong or unsupported field."""
    try:
        return _checked(CompletionRequest.model_validate_json(body))
    except ValidationError as error:
        raise _invalid(error) from None


def checked(fields: Mapping[str, object]) -> CompletionRequest:
    """The same for fields that were read elsewhere (gRPC)."""
    try:
        return _checked(CompletionRequest.model_validate(fields))
    except ValidationError as error:
        raise _invalid(error) from None


def _checked(request: CompletionRequest) -> CompletionRequest:
    refuse_unsupported(request.model_extra or {})
    if not request.prompts:
        raise InvalidRequest("prompt must not be an empty list", "prompt")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", "stream_options")
    return request


def refuse_unsupported(fields: Mapping[str, object]) -> None:
    """Raise InvalidRequest for the first field that would change the answer."""
    for name, value in fields.items():
        neutral = UNSUPPORTED.get(name)
        if neutral is not None and not any(value == item and _same_kind(value, item) for item in neutral):
            raise InvalidRequest(f"{name} is not supported by this server", name, "unsupported_parameter")


def _same_kind(value: object, neutral: object) -> bool:
    """0 is neutral where 0.0 is, but false is not."""
    return isinstance(value, bool) == isinstance(neutral, bool)


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        message = first["msg"].removeprefix("Invalid JSON: ")
        return InvalidRequest(f"the body is not valid JSON: {message}", None, "invalid_json")
    if not first["loc"]:
        return InvalidRequest("the body must be a JSON object", None, "invalid_json")
    param = str(first["loc"][0])
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is required", param, "missing_required_parameter")
    return InvalidRequest(f"{param}: {first['msg']}", param)
