"""What a choice says, as messages of baton.v1.Inference. One object per call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from baton.common.sampling import TokenLogprobs
from protos import inference_pb2 as pb
from router.choice import Choice, group_id, total_usage
from router.completion_answer import LONG_REPORT
from router.completions import prompt_text
from router.openai_schema import CompletionRequest
from router.text import TextDelta
from router.tokenizer import Tokenizer


class GrpcAnswer:
    """`message` is called with all deltas of all choices, those of each choice in order."""

    def __init__(self, request: CompletionRequest, choices: list[Choice], tokenizer: Tokenizer) -> None:
        self._request = request
        self._choices = choices
        self._tokenizer = tokenizer
        self._request_id = group_id(choices)
        self._begun: set[Choice] = set()
        self._num_ended = 0

    async def message(self, choice: Choice, delta: TextDelta) -> pb.GenerateResponse:
        response = pb.GenerateResponse(
            request_id=self._request_id,
            index=choice.index,
            text=delta.text,
            token_ids=delta.token_ids if self._request.return_token_ids else (),
            logprobs=self._entries(delta.logprobs, self._request.logprobs),
        )
        if choice not in self._begun:
            self._begun.add(choice)
            await self._add_prompt(response, choice)
        if delta.finish_reason is not None:
            self._add_end(response, choice, delta)
        return response

    async def _add_prompt(self, response: pb.GenerateResponse, choice: Choice) -> None:
        if self._request.echo:
            response.text = prompt_text(self._request, choice, self._tokenizer) + response.text
        await choice.prompt_known()
        num_top = choice.first.generation.request.sampling.prompt_logprobs

        def read() -> list[pb.TokenLogprob]:
            return list(self._entries(choice.prompt_logprobs(), num_top))

        is_long = len(choice.generation.request.token_ids) >= LONG_REPORT
        response.prompt_logprobs.extend(await asyncio.to_thread(read) if is_long else read())

    def _add_end(self, response: pb.GenerateResponse, choice: Choice, delta: TextDelta) -> None:
        path, _, reason = choice.path.partition("; ")
        response.finish_reason = delta.finish_reason or ""
        response.path, response.path_reason = path, reason
        if isinstance(delta.stop_reason, str):
            response.stop_string = delta.stop_reason
        elif delta.stop_reason is not None:
            response.stop_token_id = delta.stop_reason
        self._num_ended += 1
        if self._num_ended == len(self._choices):
            usage = total_usage(self._choices)
            response.usage.prompt_tokens = usage.prompt_tokens
            response.usage.completion_tokens = usage.completion_tokens
            response.usage.total_tokens = usage.total_tokens

    def _entries(self, known: Iterable[TokenLogprobs], num_top: int | None) -> Iterable[pb.TokenLogprob]:
        text = self._tokenizer.texts.text
        for token in known:
            top = [
                pb.LikelyToken(token_id=token_id, text=text(token_id), logprob=logprob)
                for token_id, logprob in token.top[:num_top]
            ]
            yield pb.TokenLogprob(
                token_id=token.token_id,
                text=text(token.token_id),
                logprob=token.logprob,
                rank=token.rank,
                top=top,
            )
