"""Answers that are being generated: tokens back to text, and what they add up to. Shared by all endpoints.

Made by submitter.py; read by the endpoints, on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import asdict, dataclass

from baton.common.sampling import TokenLogprobs
from router.attempt import read_logprobs
from router.generation import Generation
from router.text import TextAssembler, TextDelta
from router.turns import Turns


@dataclass(slots=True)
class Usage:
    """Counted once, by the router: the prompt as submitted and the tokens as delivered."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, int]:
        """As OpenAI's API has it."""
        return asdict(self) | {"total_tokens": self.total_tokens}


class Choice:
    """One answer to one prompt; an async iterator of TextDelta. `index` is its place in the request.

    `first` is the prompt's first answer, whose `usage` counts the prompt; those of the others do not.
    `prompt_only`: the output is dropped, what is wanted is the report on the prompt.
    """

    def __init__(
        self,
        index: int,
        generation: Generation,
        assembler: TextAssembler,
        first: Choice | None = None,
        *,
        prompt_only: bool = False,
    ) -> None:
        self.index = index
        self.generation = generation
        self.first = first or self
        self.usage = Usage(len(generation.request.token_ids) if first is None else 0)
        self._assembler = assembler
        self._prompt_only = prompt_only

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        """Ends after the delta with a finish reason; raises the error that ended the request."""
        async for event in self.generation:
            if self._prompt_only:
                if event.finish_reason is not None:
                    yield TextDelta("", (), "length")
                continue
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

    async def prompt_known(self) -> None:
        """Returns once what is reported on the prompt has come, with the first token of the prompt's first choice.

        Another choice's may be here sooner. Raises the error that ended the first choice without a token.
        """
        await self.first.generation.first_token()

    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Of every token of the prompt but the first, if asked for; see `prompt_known`.

        Those of a long prompt take a while to read; any thread may do it.
        """
        return tuple(map(read_logprobs, self.first.generation.prompt_logprobs))

    def close(self) -> None:
        """Free whatever still runs for it."""
        self.generation.close()


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
    """Deltas of all choices as they come; what is done with one belongs to this turn. The first error is raised."""
    turns = Turns()
    if len(choices) == 1:
        async for delta in choices[0]:
            yield choices[0], delta
            await turns.give_way()
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
                    await turns.give_way()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _next(deltas: AsyncIterator[TextDelta]) -> TextDelta | None:
    return await anext(deltas, None)
