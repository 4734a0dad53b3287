"""The answers of /v1/chat/completions: the whole message, and the chunks of a stream. One object per request."""

from __future__ import annotations

import time

from router.answers import Content, with_usage
from router.chat_request import ChatRequest
from router.choice import Choice, group_id, total_usage
from router.json_pieces import EncodedList, dumps
from router.text import TextDelta
from router.token_text import TokenTexts
from router.tokenizer import Tokenizer
from router.turns import Turns


class ChatAnswer:
    """Implements `Answer`. The first chunk of a choice also says whose message it is."""

    def __init__(self, request: ChatRequest, choices: list[Choice], tokenizer: Tokenizer) -> None:
        self.choices = choices
        self._request = request
        self._texts: TokenTexts = tokenizer.texts
        self._head: Content = {"id": group_id(choices), "created": int(time.time()), "model": request.model}
        self._begun: set[Choice] = set()

    @property
    def is_heavy(self) -> bool:
        return False

    async def chunk(self, choice: Choice, delta: TextDelta) -> Content:
        message: Content = {} if choice in self._begun else {"role": "assistant"}
        self._begun.add(choice)
        if delta.text or message:
            message["content"] = delta.text
        content = self._chunk([self._choice(choice, delta, "delta", message, self._entries(delta))])
        return with_usage(content, self._request.stream_usage, self.choices)

    def last_chunk(self) -> Content | None:
        if not self._request.stream_usage.include_usage:
            return None
        return self._chunk([]) | {"usage": total_usage(self.choices).as_dict()}

    async def whole(self, deltas: list[list[TextDelta]]) -> Content:
        contents, turns = [], Turns()
        for choice, parts in zip(self.choices, deltas, strict=True):
            message: Content = {"role": "assistant", "content": "".join(delta.text for delta in parts), "refusal": None}
            entries: list[str] = []
            for delta in parts:
                entries += map(dumps, self._entries(delta))
                await turns.give_way()
            contents.append(self._choice(choice, parts[-1], "message", message, EncodedList(entries)))
            if self._request.return_token_ids:
                contents[-1]["token_ids"] = [token_id for delta in parts for token_id in delta.token_ids]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": contents,
            "usage": total_usage(self.choices).as_dict(),
        }

    def _chunk(self, choices: list[Content]) -> Content:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _choice(self, choice: Choice, delta: TextDelta, kind: str, message: Content, entries: object) -> Content:
        """`delta` is the last one."""
        content: Content = {
            "index": choice.index,
            kind: message,
            "logprobs": None if self._request.num_top is None else {"content": entries, "refusal": None},
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return content | {"token_ids": delta.token_ids} if self._request.return_token_ids else content

    def _entries(self, delta: TextDelta) -> list[Content]:
        """One per token. A token may be part of a character, so its bytes say more than its text."""
        num_top = self._request.num_top
        if num_top is None:
            return []
        return [
            self._entry(token.token_id, token.logprob)
            | {"top_logprobs": [self._entry(*top) for top in token.top[:num_top]]}
            for token in delta.logprobs
        ]

    def _entry(self, token_id: int, logprob: float) -> Content:
        as_id = self._request.return_tokens_as_token_ids
        text = f"token_id:{token_id}" if as_id else self._texts.text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(self._texts.raw(token_id))}
