"""The answers of /v1/completions: the whole completion, and the chunks of a stream. One object per request."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial

from router.answers import Content, with_usage
from router.choice import Choice, group_id, total_usage
from router.completion_logprobs import (
    Entries,
    LogprobLists,
    by_id,
    joined,
    name_by_id,
    output_logprobs,
    prompt_logprobs,
)
from router.completions import prompt_text
from router.openai_schema import CompletionRequest
from router.text import TextDelta
from router.tokenizer import Tokenizer

LONG_REPORT = 512  # tokens from which putting a report into words leaves the event loop


@dataclass(frozen=True, slots=True)
class _OfPrompt:
    """What the client wants to see of a prompt: its text and log-probabilities before the output's, and these by id."""

    text: str = ""
    logprobs: LogprobLists | None = None
    by_id: list[Entries | None] | None = None


class CompletionAnswer:
    """Implements `Answer`. A choice's first chunk also carries what the client wants to see of the prompt."""

    def __init__(self, request: CompletionRequest, choices: list[Choice], tokenizer: Tokenizer) -> None:
        self.choices = choices
        self._request = request
        self._tokenizer = tokenizer
        self._name = name_by_id if request.return_tokens_as_token_ids else tokenizer.texts.text
        self._head = {
            "id": group_id(choices),
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._prompts: dict[Choice, _OfPrompt] = {}  # by the prompt's first choice
        self._begun: set[Choice] = set()

    @property
    def is_heavy(self) -> bool:
        return bool(self._request.echo) or self._request.prompt_logprobs is not None

    async def chunk(self, choice: Choice, delta: TextDelta) -> Content:
        of_prompt = await self._of_prompt(choice)
        is_first = choice not in self._begun
        self._begun.add(choice)
        content: Content = {**self._head, "choices": [self._choice(choice, delta, of_prompt, shows_prompt=is_first)]}
        return with_usage(content, self._request.stream_usage, self.choices)

    def last_chunk(self) -> Content | None:
        if not self._request.stream_usage.include_usage:
            return None
        return {**self._head, "choices": [], "usage": total_usage(self.choices).as_dict()}

    async def whole(self, deltas: list[list[TextDelta]]) -> Content:
        contents = []
        for choice, parts in zip(self.choices, deltas, strict=True):
            of_prompt = await self._of_prompt(choice)
            compose = partial(self._choice, choice, _joined(parts), of_prompt, shows_prompt=True)
            is_long = self._request.logprobs is not None and choice.usage.completion_tokens >= LONG_REPORT
            contents.append(await asyncio.to_thread(compose) if is_long else compose())
            await asyncio.sleep(0)
        return {**self._head, "choices": contents, "usage": total_usage(self.choices).as_dict()}

    def _choice(self, choice: Choice, delta: TextDelta, of_prompt: _OfPrompt, *, shows_prompt: bool) -> Content:
        logprobs = None
        if self._request.logprobs is not None:
            of_output = output_logprobs(delta, len(of_prompt.text), self._request.logprobs, self._name)
            logprobs = joined(of_prompt.logprobs if shows_prompt else None, of_output).as_dict()
        content: Content = {
            "index": choice.index,
            "text": of_prompt.text + delta.text if shows_prompt else delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if shows_prompt and of_prompt.by_id is not None:
            content["prompt_logprobs"] = of_prompt.by_id
        return content | {"token_ids": delta.token_ids} if self._request.return_token_ids else content

    async def _of_prompt(self, choice: Choice) -> _OfPrompt:
        """Made once per prompt."""
        if not self._request.echo and self._request.prompt_logprobs is None:
            return _OfPrompt()
        known = self._prompts.get(choice.first)
        if known is None:
            await choice.prompt_known()
            is_long = len(choice.generation.request.token_ids) >= LONG_REPORT
            known = await asyncio.to_thread(self._read_prompt, choice) if is_long else self._read_prompt(choice)
            self._prompts[choice.first] = known
        return known

    def _read_prompt(self, choice: Choice) -> _OfPrompt:
        request, texts = self._request, self._tokenizer.texts
        token_ids = choice.generation.request.token_ids
        known = choice.prompt_logprobs()
        ids = None if request.prompt_logprobs is None else by_id(known, request.prompt_logprobs, texts.text)
        if not request.echo:
            return _OfPrompt(by_id=ids)
        text = prompt_text(request, choice, self._tokenizer)
        if request.logprobs is None:
            return _OfPrompt(text, None, ids)
        offsets = texts.offsets(token_ids, text)
        return _OfPrompt(text, prompt_logprobs(token_ids, known, offsets, request.logprobs, self._name), ids)


def _joined(deltas: list[TextDelta]) -> TextDelta:
    last = deltas[-1]
    return TextDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        finish_reason=last.finish_reason,
        stopped=last.stopped,
        stop_reason=last.stop_reason,
        offsets=tuple(offset for delta in deltas for offset in delta.offsets),
        logprobs=tuple(known for delta in deltas for known in delta.logprobs),
    )
