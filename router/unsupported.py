"""Fields of completion requests to OpenAI, vLLM and SGLang that this server does not support, each with the values that
change nothing. Any other value is refused by name: an answer that ignores what was asked for is worse than none.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Nothing: TypeAlias = None
Off = Literal[False] | None
On = Literal[True] | None
One = Annotated[int, Field(ge=1, le=1)] | None
Zero = Annotated[int, Field(ge=0, le=0)] | None
UnitPenalty = Annotated[float, Field(ge=1, le=1)] | None
EmptyList = Annotated[list[None], Field(max_length=0)] | None


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
    ebnf: Nothing = None
    guided_choice: Nothing = None
    guided_grammar: Nothing = None
    guided_json: Nothing = None
    guided_regex: Nothing = None
    guided_whitespace_pattern: Nothing = None
    json_schema: Nothing = None
    kv_transfer_params: Nothing = None
    length_penalty: UnitPenalty = None
    logits_processors: EmptyList = None
    lora_path: Nothing = None
    priority: Zero = None
    prompt_embeds: Nothing = None
    regex: Nothing = None
    response_format: PlainText | None = None
    skip_special_tokens: On = None
    spaces_between_special_tokens: On = None
    structured_outputs: Nothing = None
    suffix: Literal[""] | None = None
    truncate_prompt_tokens: Nothing = None
    use_beam_search: Off = None
    vllm_xargs: Nothing = None
