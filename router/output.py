"""What a request has emitted so far and how it ended: written by its attempts, read by the front end.

The buffer between the two is bounded: see MAX_UNREAD_TOKENS in generation.py. What a slow reader finds there comes in
pieces that are small enough to be put into words in one turn of the loop. Event loop only.
"""

from __future__ import annotations

import asyncio

from baton.common import events
from baton.common.clock import Clock
from baton.common.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded
from baton.common.sampling import TokenLogprobs
from router.metrics import Metrics
from router.record import RequestRecord
from router.types import RequestCancelled, TokenEvent

MAX_EVENT_TOKENS = 32
_LABELS: dict[type[BatonError], str] = {
    RequestCancelled: "cancelled",
    DeadlineExceeded: "deadline",
    Overloaded: "overloaded",
    InvalidRequest: "invalid",
}


class Output:
    """Tokens are only ever appended; the end is set exactly once, by `finish` or by `fail`."""

    def __init__(self, record: RequestRecord, metrics: Metrics, clock: Clock) -> None:
        self.emitted: list[int] = []
        self.last_token_at = clock.now()
        self._record = record
        self._metrics = metrics
        self._clock = clock
        self._num_read = 0
        self._unread_logprobs: list[TokenLogprobs] = []
        self._finish_reason: str | None = None
        self._error: BatonError | None = None
        self._end_was_read = False
        self._news = asyncio.Event()
        self._begun = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self._finish_reason is not None or self._error is not None

    @property
    def num_unread(self) -> int:
        return len(self.emitted) - self._num_read

    async def next(self) -> TokenEvent | None:
        """The next unread tokens, up to MAX_EVENT_TOKENS, as soon as there are any; None after the last event.

        Raises the error that ended it, after all tokens.
        """
        while not self.num_unread and not self.is_over:
            self._news.clear()
            await self._news.wait()
        unread = tuple(self.emitted[self._num_read : self._num_read + MAX_EVENT_TOKENS])
        self._num_read += len(unread)
        logprobs = tuple(self._unread_logprobs[:MAX_EVENT_TOKENS])
        del self._unread_logprobs[:MAX_EVENT_TOKENS]
        if self._finish_reason is not None and not self.num_unread:
            was_read, self._end_was_read = self._end_was_read, True
            return None if was_read else TokenEvent(unread, self._finish_reason, logprobs)
        if unread:
            return TokenEvent(unread, None, logprobs)
        if self._error is not None:
            raise self._error
        return None

    async def first_token(self) -> None:
        """Returns once a token is out, or it is over. Raises the error that ended it without any."""
        await self._begun.wait()
        if not self.emitted and self._error is not None:
            raise self._error

    def add(self, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] = ()) -> None:
        """Tokens in order, each exactly once. `logprobs`: one per token, or none at all in the whole request."""
        now = self._clock.now()
        self._record.count_tokens(len(tokens))
        if self.emitted:
            self._metrics.itl.observe((now - self.last_token_at) / len(tokens))
        else:
            self._metrics.ttft.labels(self._path).observe(now - self._record.received_at)
        self.last_token_at = now
        self.emitted.extend(tokens)
        self._unread_logprobs.extend(logprobs)
        self._metrics.output_tokens.inc(len(tokens))
        self._news.set()
        self._begun.set()

    def finish(self, reason: str) -> None:
        """The request is complete. A no-op once it is over."""
        if not self.is_over:
            self._finish_reason = reason
            self._record.finish_reason = reason
            self._end(events.LAST_TOKEN, reason)

    def fail(self, error: BatonError) -> None:
        """The request ends with an error, after the tokens so far. A no-op once it is over."""
        if not self.is_over:
            self._error = error
            self._record.error = f"{type(error).__name__}: {error}"
            name = events.CANCELLED if isinstance(error, RequestCancelled) else events.FAILED
            self._end(name, _LABELS.get(type(error), "error"))

    def _end(self, event: str, label: str) -> None:
        self._news.set()
        self._begun.set()
        self._record.mark(event)
        self._metrics.requests.labels(self._path, label).inc()
        self._metrics.e2e.labels(self._path).observe(self._clock.now() - self._record.received_at)
        first_us = self._record.router_us(events.FIRST_TOKEN)
        if len(self.emitted) > 1 and first_us is not None:
            decode_s = self.last_token_at - self._record.received_at - first_us / 1e6
            self._metrics.tpot.labels(self._path).observe(max(decode_s, 0.0) / (len(self.emitted) - 1))

    @property
    def _path(self) -> str:
        return self._record.decision.path if self._record.decision else "none"
