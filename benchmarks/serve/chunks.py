"""Reads the JSON chunks of a streamed completion into a record: how many tokens, when, and why it ended.

Pure: `CompletionReader` is fed payloads with their arrival times, by the client or by a test.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.serve.records import Counting, Failure, RequestRecord


class StreamFault(Exception):
    """The stream cannot be taken as an answer. `kind` is a `Failure`."""

    def __init__(self, kind: Failure, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class CompletionReader:
    """Fills one record from the chunks of one stream."""

    def __init__(self, record: RequestRecord, counting: Counting) -> None:
        self.finished = False
        """`[DONE]` has come."""
        self.counted_by: set[Counting] = set()
        self._record = record
        self._counting = counting
        self._usage_total: int | None = None
        self._seen = 0
        self._bare_finish: float | None = None

    def feed(self, payload: bytes, now: float) -> None:
        """One event's data. Raises StreamFault."""
        if payload == b"[DONE]":
            self.finished = True
            return
        try:
            chunk = json.loads(payload)
        except ValueError as error:
            raise StreamFault(Failure.BAD_EVENTS, f"a chunk is not JSON: {payload[:64]!r}") from error
        if not isinstance(chunk, dict):
            raise StreamFault(Failure.BAD_EVENTS, f"a chunk is not an object: {payload[:64]!r}")
        if "error" in chunk:
            raise StreamFault(Failure.SERVER_ERROR, json.dumps(chunk["error"])[:400])
        try:
            self._read(chunk, now)
        except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            raise StreamFault(Failure.BAD_EVENTS, f"{type(error).__name__}: {error} in {payload[:64]!r}") from error

    def close(self) -> None:
        """The response ended well: settle the token count. Raises StreamFault for an answer that is not one."""
        record = self._record
        if not self.finished:
            raise StreamFault(Failure.INCOMPLETE, "the stream ended without [DONE]")
        if self._bare_finish is not None and self._usage_total == self._seen + 1:
            self._add(1, self._bare_finish, Counting.CHUNKS)  # The last token has no text of its own.
        record.output_tokens = self._seen if self._usage_total is None else self._usage_total
        if record.output_tokens < 1 or not record.chunk_times:
            raise StreamFault(Failure.NO_TOKENS, "the stream carried no token")

    def _read(self, chunk: dict[str, Any], now: float) -> None:
        record = self._record
        record.request_id = record.request_id or chunk.get("id")
        usage = chunk.get("usage")
        if usage:
            self._read_usage(usage)
        for choice in chunk.get("choices", []):
            self._read_choice(choice, usage, now)
            record.finish_reason = choice.get("finish_reason") or record.finish_reason

    def _read_usage(self, usage: dict[str, Any]) -> None:
        self._usage_total = int(usage["completion_tokens"])
        self._record.prompt_tokens = int(usage["prompt_tokens"])
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        self._record.cached_tokens = None if cached is None else int(cached)

    def _read_choice(self, choice: dict[str, Any], usage: dict[str, Any] | None, now: float) -> None:
        token_ids = choice.get("token_ids")
        if self._counting is Counting.TOKEN_IDS and token_ids is not None:
            self._add(len(token_ids), now, Counting.TOKEN_IDS)
        elif self._counting is Counting.USAGE and usage:
            self._add(int(usage["completion_tokens"]) - self._seen, now, Counting.USAGE)
        elif choice.get("text") or choice.get("finish_reason") is None:
            self._add(1, now, Counting.CHUNKS)
        else:
            self._bare_finish = now

    def _add(self, tokens: int, now: float, counted_by: Counting) -> None:
        if tokens < 0:
            raise ValueError("the token count went back")
        if tokens == 0:
            return
        self._seen += tokens
        self._record.chunk_times.append(now)
        self._record.chunk_tokens.append(tokens)
        self.counted_by.add(counted_by)
