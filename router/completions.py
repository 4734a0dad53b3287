"""A validated API request to running generations, and their tokens back to text. Shared by HTTP and gRPC.

`start` does everything that can refuse a request; nothing is queued before it has succeeded for every prompt.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass

from baton.common.errors import InvalidRequest, ModelNotFound
from baton.common.sampling import SamplingParams
from router.dispatcher import Dispatcher, Generation
from router.openai_schema import CompletionRequest
from router.text import TextAssembler, TextDelta
from router.tokenizer import Tokenizer
from router.types import GenerationRequest

DEFAULT_MAX_TOKENS = 16
_LONG_TEXT = 2048  # characters from which tokenising leaves the event loop
_GREEDY_BELOW = 1e-5
_MIN_TOP_P = 1e-6


@dataclass(slots=True)
class Usage:
    """Counted once, by the router: the prompt as submitted and the tokens as delivered."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Choice:
    """One prompt being answered; an async iterator of TextDelta. `index` is its place in the request."""

    def __init__(self, index: int, generation: Generation, assembler: TextAssembler) -> None:
        self.index = index
        self.generation = generation
        self.usage = Usage(len(generation.request.token_ids))
        self._assembler = assembler

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        """Ends after the delta with a finish reason; raises the error that ended the request."""
        async for event in self.generation:
            delta = self._assembler.push(event)
            self.usage.completion_tokens += len(delta.token_ids)
            if delta.stopped:
                self.generation.finish(self.usage.completion_tokens)
            yield delta
            if delta.finish_reason is not None:
                return

    @property
    def path(self) -> str:
        """ "remote; why", known from the first delta on."""
        decision = self.generation.decision
        return f"{decision.path}; {decision.reason}" if decision else "none; not dispatched"

    def close(self) -> None:
        """Free whatever still runs for it."""
        self.generation.close()


class Completions:
    """Owned by the router; one per process."""

    def __init__(self, dispatcher: Dispatcher, tokenizer: Tokenizer, model: str, request_timeout_s: float) -> None:
        self.model = model
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._request_timeout_s = request_timeout_s

    @property
    def max_model_len(self) -> int:
        return self._dispatcher.registry.max_model_len

    async def start(self, request: CompletionRequest, timeout_s: float | None = None) -> list[Choice]:
        """Submit every prompt of a request; the caller closes the choices.

        `timeout_s`: the client's own deadline. Raises InvalidRequest, ModelNotFound or Unavailable.
        """
        if request.model != self.model:
            raise ModelNotFound(request.model, [self.model])
        self._dispatcher.metrics.ignored_fields.inc(request.num_ignored_fields)
        prompts = [await self._token_ids(prompt) for prompt in request.prompts]
        limits = [self._max_tokens(request, prompt) for prompt in prompts]
        request_id = new_request_id()
        ids = [request_id] if len(prompts) == 1 else [f"{request_id}-{index}" for index in range(len(prompts))]
        timeout_s = min(self._request_timeout_s, timeout_s or self._request_timeout_s)
        return [
            self._submit(index, GenerationRequest(id_, prompt, self._sampling(request, limit), timeout_s), request)
            for index, (id_, prompt, limit) in enumerate(zip(ids, prompts, limits, strict=True))
        ]

    def cancel(self, request_id: str) -> bool:
        return self._dispatcher.cancel(request_id)

    def _submit(self, index: int, generation: GenerationRequest, request: CompletionRequest) -> Choice:
        assembler = TextAssembler(
            self._tokenizer, generation.token_ids, request.stop_strings, generation.sampling.stop_token_ids
        )
        return Choice(index, self._dispatcher.submit(generation), assembler)

    async def _token_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await self._encode(prompt)
        self._check_length(len(prompt), 1)
        largest, vocab_size = max(prompt), self._tokenizer.vocab_size
        if largest >= vocab_size:
            raise InvalidRequest(f"token id {largest} is outside the vocabulary of {vocab_size}", "prompt")
        return tuple(prompt)

    async def _encode(self, text: str) -> tuple[int, ...]:
        """Text that is too long by any count is refused unread."""
        self._check_length(self._tokenizer.min_tokens(text), 1)
        encode = self._tokenizer.encode
        ids = await asyncio.to_thread(encode, text) if len(text) >= _LONG_TEXT else encode(text)
        if not ids:
            raise InvalidRequest("the prompt has no tokens", "prompt")
        return ids

    def _max_tokens(self, request: CompletionRequest, prompt: tuple[int, ...]) -> int:
        """As asked; the default shrinks to what the model has room for."""
        if request.max_tokens is not None:
            self._check_length(len(prompt), request.max_tokens)
            return request.max_tokens
        self._check_length(len(prompt), 1)
        room = self.max_model_len - len(prompt)
        return min(DEFAULT_MAX_TOKENS, room) if room > 0 else DEFAULT_MAX_TOKENS

    def _check_length(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Before any worker has attached the limit is not known; the dispatcher then waits for one that fits."""
        limit = self.max_model_len
        if limit and num_prompt_tokens + max_tokens > limit:
            message = (
                f"this server's limit is {limit} tokens for prompt and output together; "
                f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed it"
            )
            param = "prompt" if num_prompt_tokens >= limit else "max_tokens"
            raise InvalidRequest(message, param, "context_length_exceeded")

    def _sampling(self, request: CompletionRequest, max_tokens: int) -> SamplingParams:
        temperature = 1.0 if request.temperature is None else request.temperature
        top_k = -1 if request.top_k is None else request.top_k
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_p=1.0 if request.top_p is None else max(request.top_p, _MIN_TOP_P),
            top_k=-1 if top_k < 1 else top_k,
            seed=secrets.randbits(64) if request.seed is None else request.seed % 2**64,
            stop_token_ids=frozenset() if request.ignore_eos else self._tokenizer.eos_ids,
        )


def new_request_id() -> str:
    return f"cmpl-{secrets.token_hex(16)}"


def group_id(choices: list[Choice]) -> str:
    """The id of the API request to which the choices belong."""
    first = choices[0].generation.request.request_id
    return first if len(choices) == 1 else first.rpartition("-")[0]


def total_usage(choices: Iterable[Choice]) -> Usage:
    usage = Usage()
    for choice in choices:
        usage.prompt_tokens += choice.usage.prompt_tokens
        usage.completion_tokens += choice.usage.completion_tokens
    return usage


async def merged(choices: list[Choice]) -> AsyncGenerator[tuple[Choice, TextDelta], None]:
    """Deltas of all choices as they come. The first error ends it and is raised."""
    if len(choices) == 1:
        async for delta in choices[0]:
            yield choices[0], delta
        return
    pending: dict[asyncio.Task[TextDelta | None], tuple[Choice, AsyncIterator[TextDelta]]] = {}
    for choice in choices:
        deltas = aiter(choice)
        pending[asyncio.create_task(_next(deltas))] = choice, deltas
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                choice, deltas = pending.pop(task)
                if (news := task.result()) is not None:
                    pending[asyncio.create_task(_next(deltas))] = choice, deltas
                    yield choice, news
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _next(deltas: AsyncIterator[TextDelta]) -> TextDelta | None:
    return await anext(deltas, None)
