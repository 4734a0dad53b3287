"""Fields of OpenAI's and vLLM's completion requests that this server does not support, each with the values that change
nothing. Any other value is refused by name: an answer that silently ignores what was asked for is worse than none.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Nothing: TypeAlias = None
Off = Literal[False] | None
On = Literal[True] | None
One = Annotated[int, Field(ge=1, le=1)] | None
ZeroPenalty = Annotated[float, Field(ge=0, le=0)] | None
UnitPenalty = Annotated[float, Field(ge=1, le=1)] | None
EmptyList = Annotated[list[None], Field(max_length=0)] | None
EmptyMap = Annotated[dict[str, None], Field(max_length=0)] | None


class PlainText(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]


class UnsupportedFields(BaseModel):
    """Base of the request model. The types do the refusing, without building the values."""

    add_special_tokens: On = None
    allowed_token_ids: EmptyList = None
    bad_words: EmptyList = None
    best_of: One = None
    cache_salt: Nothing = None
    echo: Off = None
    frequency_penalty: ZeroPenalty = None
    guided_choice: Nothing = None
    guided_grammar: Nothing = None
    guided_json: Nothing = None
    guided_regex: Nothing = None
    include_stop_str_in_output: Off = None
    kv_transfer_params: Nothing = None
    length_penalty: UnitPenalty = None
    logit_bias: EmptyMap = None
    logits_processors: EmptyList = None
    logprobs: Nothing = None
    min_p: ZeroPenalty = None
    min_tokens: ZeroPenalty = None
    n: One = None
    presence_penalty: ZeroPenalty = None
    prompt_embeds: Nothing = None
    prompt_logprobs: Nothing = None
    repetition_penalty: UnitPenalty = None
    response_format: PlainText | None = None
    return_tokens_as_token_ids: Off = None
    skip_special_tokens: On = None
    stop_token_ids: EmptyList = None
    structured_outputs: Nothing = None
    suffix: Literal[""] | None = None
    truncate_prompt_tokens: Nothing = None
    use_beam_search: Off = None
