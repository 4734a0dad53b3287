"""From token ids and sampling settings to running generations: what the endpoints share. Event loop only.

Everything that can refuse a request happens before its first generation is submitted.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from baton.common.errors import InvalidRequest, ModelNotFound
from baton.common.sampling import SamplingParams
from router.choice import Choice
from router.dispatcher import Dispatcher
from router.report_limit import check_reports
from router.sampling_defaults import SamplingDefaults
from router.sampling_fields import MAX_CHOICES, SamplingFields
from router.shared_prompt import SharedPrompt
from router.text import TextAssembler
from router.tokenizer import Tokenizer
from router.types import GenerationRequest

TokenIds = tuple[int, ...]
_LONG_TEXT = 2048  # characters from which tokenising leaves the event loop


class Submitter:
    """Owned by the router; one per process. `model` is the name that clients use."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        model: str,
        request_timeout_s: float,
        defaults: SamplingDefaults | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.defaults = defaults or SamplingDefaults()
        self._dispatcher = dispatcher
        self._request_timeout_s = request_timeout_s

    @property
    def max_model_len(self) -> int:
        """Prompt and output together, in tokens; 0 before any worker has attached."""
        return self._dispatcher.registry.max_model_len

    def accept(self, model: str, num_ignored_fields: int) -> None:
        """Raises ModelNotFound unless the request is for this server's model; counts fields that nobody knows."""
        if model != self.model:
            raise ModelNotFound(model, [self.model])
        self._dispatcher.metrics.ignored_fields.inc(num_ignored_fields)

    # ---- prompts

    async def token_ids(self, prompts: Sequence[str | Sequence[int]]) -> list[TokenIds]:
        """Prompts as text or as ids, checked. Raises InvalidRequest."""
        encoded = iter(await self.encode([prompt for prompt in prompts if isinstance(prompt, str)]))
        checked: list[TokenIds] = []
        for prompt in prompts:
            checked.append(next(encoded) if isinstance(prompt, str) else self._check_ids(prompt))
            await asyncio.sleep(0)
        return checked

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[TokenIds]:
        """Text that is too long by any count is refused unread. Raises InvalidRequest."""
        for text in texts:
            self.check_length(self.tokenizer.min_tokens(text), 1)
        encode = partial(
            self.tokenizer.encode, add_special_tokens=add_special_tokens, max_tokens=self.max_model_len or None
        )

        def encode_all() -> list[TokenIds]:
            return list(map(encode, texts))

        is_long = sum(map(len, texts)) >= _LONG_TEXT
        encoded = await asyncio.to_thread(encode_all) if is_long else encode_all()
        if not all(encoded):
            raise InvalidRequest("the prompt has no tokens", "prompt")
        return encoded

    def _check_ids(self, prompt: Sequence[int]) -> TokenIds:
        self.check_length(len(prompt), 1)
        largest, vocab_size = max(prompt), self.tokenizer.vocab_size
        if largest >= vocab_size:
            raise InvalidRequest(f"token id {largest} is outside the vocabulary of {vocab_size}", "prompt")
        return tuple(prompt)

    def max_tokens(self, num_prompt_tokens: int, asked: int | None, default: int) -> int:
        """As asked; the default shrinks to what the model has room for. Raises InvalidRequest.

        Also a request for a report on the prompt alone draws a token.
        """
        if asked is not None:
            self.check_length(num_prompt_tokens, max(asked, 1))
            return asked
        self.check_length(num_prompt_tokens, 1)
        room = self.max_model_len - num_prompt_tokens
        return min(default, room) if room > 0 else default

    def check_length(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Before any worker has attached the limit is not known; the dispatcher then waits for one that fits."""
        limit = self.max_model_len
        if limit and num_prompt_tokens + max_tokens > limit:
            message = (
                f"this server's limit is {limit} tokens for prompt and output together; "
                f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed it"
            )
            param = "prompt" if num_prompt_tokens >= limit else "max_tokens"
            raise InvalidRequest(message, param, "context_length_exceeded")

    # ---- generations

    async def submit(
        self,
        prompts: Sequence[TokenIds],
        fields: SamplingFields,
        max_tokens: Sequence[int],
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        id_prefix: str = "cmpl",
        timeout_s: float | None = None,
    ) -> list[Choice]:
        """Start `fields.n` answers to every prompt; the caller closes them. Choices of prompt p begin at index p * n.

        `max_tokens`: one per prompt. `logprobs`, `prompt_logprobs`: how many of the likeliest tokens to report beside
        each token, None for no report. A `max_tokens` of 0 asks for the report on the prompt alone. `timeout_s`: the
        client's own deadline. Raises InvalidRequest or Unavailable.
        """
        num_choices = fields.num_choices
        if len(prompts) * num_choices > MAX_CHOICES:
            message = f"{len(prompts)} prompts with {num_choices} choices each are more than {MAX_CHOICES} choices"
            raise InvalidRequest(message, "n")
        check_reports([len(prompt) for prompt in prompts], max_tokens, num_choices, logprobs, prompt_logprobs)
        settings = [
            fields.resolve(
                self.defaults,
                max_tokens=max(limit, 1),
                eos_ids=self.tokenizer.eos_ids,
                vocab_size=self.tokenizer.vocab_size,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
            for limit in max_tokens
        ]
        ids = _request_ids(f"{id_prefix}-{secrets.token_hex(16)}", len(prompts) * num_choices)
        timeout_s = min(self._request_timeout_s, timeout_s or self._request_timeout_s)
        choices: list[Choice] = []
        try:
            for prompt, sampling, limit in zip(prompts, settings, max_tokens, strict=True):
                first: Choice | None = None
                shared = SharedPrompt() if num_choices > 1 else None
                for number in range(num_choices):
                    one = _for_choice(sampling, number)
                    request = GenerationRequest(ids[len(choices)], prompt, one, timeout_s)
                    assembler = self._assembler(prompt, fields, one)
                    generation = self._dispatcher.submit(request, shared)
                    choices.append(Choice(len(choices), generation, assembler, first, prompt_only=limit == 0))
                    first = first or choices[-1]
                await asyncio.sleep(0)  # one prompt a turn: telling a worker of a long one takes milliseconds
        except BaseException:
            for choice in choices:
                choice.close()
            raise
        return choices

    def _assembler(self, prompt: TokenIds, fields: SamplingFields, sampling: SamplingParams) -> TextAssembler:
        include_stop = bool(fields.include_stop_str_in_output)
        return TextAssembler(self.tokenizer, prompt, fields.stop_strings, sampling, include_stop=include_stop)

    def cancel(self, request_id: str) -> bool:
        """Cancel what still runs of a request; False if nothing does."""
        return self._dispatcher.cancel(request_id)


def _request_ids(request_id: str, count: int) -> list[str]:
    return [request_id] if count == 1 else [f"{request_id}-{index}" for index in range(count)]


def _for_choice(sampling: SamplingParams, number: int) -> SamplingParams:
    """Choices differ in their draws; the prompt is reported on with the first."""
    if number == 0:
        return sampling
    return replace(sampling, choice=number, prompt_logprobs=None)
