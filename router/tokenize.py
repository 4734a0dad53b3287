"""POST /tokenize and /detokenize, in the form that vLLM has given them."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SkipValidation

from baton.common.errors import InvalidRequest
from router.chat_schema import ChatInput
from router.prompt_shape import MAX_PROMPT_TOKENS
from router.reader.pool import RequestReader
from router.schema_errors import validated
from router.submitter import Submitter

_LONG = 2048  # tokens from which detokenising leaves the event loop


class TokenizeOptions(BaseModel):
    """`add_special_tokens`: by default of a prompt, but not of messages, whose template writes its own."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizePrompt(TokenizeOptions):
    """For the OpenAPI document, as the next one."""

    prompt: str


class TokenizeMessages(TokenizeOptions, ChatInput):
    pass


class TokenizeAnswer(BaseModel):
    """`token_strs` as in the vocabulary, where they were asked for."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    model: str | None = None


class DetokenizeBody(DetokenizeOptions):
    tokens: SkipValidation[list[Annotated[int, Field(ge=0, lt=2**32)]]]


class DetokenizeAnswer(BaseModel):
    """Special tokens are written out."""

    prompt: str


class TokenizeService:
    """Owned by the router; one per process. All methods raise InvalidRequest or ModelNotFound."""

    def __init__(self, submitter: Submitter, reader: RequestReader) -> None:
        self._submitter = submitter
        self._reader = reader

    async def tokenize(self, body: bytes) -> dict[str, Any]:
        read = await self._reader.to_tokenize(body)
        options, num_ignored = validated(TokenizeOptions, read.fields)
        self._accept(options.model, num_ignored)
        if len(read.texts) != 1:
            raise InvalidRequest("prompt must be text", "prompt")
        add_special = not read.rendered if options.add_special_tokens is None else options.add_special_tokens
        tokenizer, [text] = self._submitter.tokenizer, read.texts
        encode = partial(tokenizer.encode, add_special_tokens=add_special, max_tokens=MAX_PROMPT_TOKENS)

        def tokens_and_strings() -> tuple[list[int], list[str] | None]:
            tokens = list(encode(text))
            return tokens, [tokenizer.entry(token) for token in tokens] if options.return_token_strs else None

        tokens, strings = await asyncio.to_thread(tokens_and_strings)
        max_model_len = self._submitter.max_model_len or None
        return {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": strings}

    async def detokenize(self, body: bytes) -> dict[str, Any]:
        read = await self._reader.to_detokenize(body)
        options, num_ignored = validated(DetokenizeOptions, read.fields)
        self._accept(options.model, num_ignored)
        tokenizer, [tokens] = self._submitter.tokenizer, read.prompts
        assert not isinstance(tokens, str)
        if tokens and max(tokens) >= tokenizer.vocab_size:
            message = f"token id {max(tokens)} is outside the vocabulary of {tokenizer.vocab_size}"
            raise InvalidRequest(message, "tokens")
        decode = partial(tokenizer.decode, list(tokens), skip_special_tokens=False)
        return {"prompt": await asyncio.to_thread(decode) if len(tokens) > _LONG else decode()}

    def _accept(self, model: str | None, num_ignored_fields: int) -> None:
        self._submitter.accept(self._submitter.model if model is None else model, num_ignored_fields)
