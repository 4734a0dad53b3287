"""The answers of /v1/completions: the whole completion, and the chunks of a stream. One object per request."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass

from router.answers import Content
from router.choice import Choice, Usage, group_id, total_usage
from router.completion_logprobs import LogprobLists, by_id, joined, name_by_id, output_logprobs, prompt_logprobs
from router.completions import prompt_text
from router.openai_schema import CompletionRequest
from router.text import TextDelta
from router.tokenizer import Tokenizer

_LONG_PROMPT = 512  # tokens from which a report on a prompt leaves the event loop


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt to be repeated before the output, and its log-probabilities, if they are wanted."""

    text: str = ""
    logprobs: LogprobLists | None = None


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
        self._echoes: dict[Choice, _Echo] = {}  # by the prompt's first choice
        self._begun: set[Choice] = set()

    @property
    def is_heavy(self) -> bool:
        return bool(self._request.echo)

    @property
    def _with_usage(self) -> bool:
        options = self._request.stream_options
        return options is not None and options.include_usage

    async def chunk(self, choice: Choice, delta: TextDelta) -> Content:
        """If the client asked for usage, chunks before the last one carry a null."""
        echo = await self._echo(choice)
        is_first = choice not in self._begun
        self._begun.add(choice)
        content: Content = {**self._head, "choices": [self._choice(choice, delta, echo, shows_echo=is_first)]}
        return content | {"usage": None} if self._with_usage else content

    def last_chunk(self) -> Content | None:
        return {**self._head, "choices": [], "usage": self._usage()} if self._with_usage else None

    async def whole(self, deltas: list[list[TextDelta]]) -> Content:
        contents = []
        for choice, parts in zip(self.choices, deltas, strict=True):
            content = self._choice(choice, _joined(parts), await self._echo(choice), shows_echo=True)
            if self._request.prompt_logprobs is not None:
                content["prompt_logprobs"] = by_id(
                    choice.prompt_logprobs, self._request.prompt_logprobs, self._tokenizer.texts.text
                )
            contents.append(content)
            await asyncio.sleep(0)
        return {**self._head, "choices": contents, "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        usage: Usage = total_usage(self.choices)
        return asdict(usage) | {"total_tokens": usage.total_tokens}

    def _choice(self, choice: Choice, delta: TextDelta, echo: _Echo, *, shows_echo: bool) -> Content:
        logprobs = None
        if self._request.logprobs is not None:
            of_output = output_logprobs(delta, len(echo.text), self._request.logprobs, self._name)
            logprobs = joined(echo.logprobs if shows_echo else None, of_output).as_dict()
        content: Content = {
            "index": choice.index,
            "text": echo.text + delta.text if shows_echo else delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return content | {"token_ids": delta.token_ids} if self._request.return_token_ids else content

    async def _echo(self, choice: Choice) -> _Echo:
        """Made once per prompt; `choice` has its first delta."""
        if not self._request.echo:
            return _Echo()
        echo = self._echoes.get(choice.first)
        if echo is None:
            is_long = len(choice.generation.request.token_ids) >= _LONG_PROMPT
            echo = await asyncio.to_thread(self._make_echo, choice) if is_long else self._make_echo(choice)
            self._echoes[choice.first] = echo
        return echo

    def _make_echo(self, choice: Choice) -> _Echo:
        token_ids = choice.generation.request.token_ids
        text = prompt_text(self._request, choice, self._tokenizer)
        if self._request.logprobs is None:
            return _Echo(text)
        offsets = self._tokenizer.texts.offsets(token_ids, text)
        known = choice.prompt_logprobs
        return _Echo(text, prompt_logprobs(token_ids, known, offsets, self._request.logprobs, self._name))


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
