"""Chunked prefill: every decoding request gets its token in every step, prompts fill what is left of the token budget.

So a long prompt delays the others' tokens by one bounded step, never by its whole length.
"""

from __future__ import annotations

from collections.abc import Collection

from baton.engine.batch import PrefillSegment, ScheduledStep
from baton.engine.block_pool import BlockPool, Use
from baton.engine.request import Phase, Request

FULL_STEP_TOKENS = 2048  # of prefill: about where a GPU's matrix products reach their full rate


class ChunkedScheduler:
    """First come, first served. A waiting request starts only when its worst case fits beside everybody else's, so no
    running request ever lacks a block and nobody overtakes the head of the queue.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._pool = pool
        self._max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: dict[str, Request] = {}
        self._running: dict[str, Request] = {}
        self._seats: set[str] = set()
        self._copies: list[tuple[int, int]] = []
        self._blocked_at: tuple[str, int] | None = None
        self._is_blocked = False

    @property
    def waiting(self) -> Collection[Request]:
        return self._waiting.values()

    @property
    def running(self) -> Collection[Request]:
        return self._running.values()

    @property
    def is_blocked(self) -> bool:
        return self._is_blocked

    def has_seat(self) -> bool:
        return len(self._running) + len(self._seats) < self._max_num_seqs

    def reserve_seat(self, owner: str) -> None:
        self._seats.add(owner)

    def free_seat(self, owner: str) -> None:
        self._seats.discard(owner)

    def add(self, request: Request) -> None:
        self._waiting[request.request_id] = request

    def admit(self, request: Request) -> None:
        request.phase = Phase.RUNNING
        self._running[request.request_id] = request

    def remove(self, request: Request) -> None:
        self._waiting.pop(request.request_id, None)
        self._running.pop(request.request_id, None)

    def schedule(self) -> ScheduledStep:
        self._copies = []  # of a schedule that went wrong: its blocks may be another's by now
        decodes = tuple(r for r in self._running.values() if r.wants_token)
        for request in decodes:
            self._pool.grow(request.request_id, self._pool.blocks_for(request.num_computed_tokens + 1))
        budget = self._max_num_batched_tokens - len(decodes)
        prefills = self._schedule_prefills(budget)
        return ScheduledStep(decodes, prefills, tuple(self._copies))

    def _schedule_prefills(self, budget: int) -> tuple[PrefillSegment, ...]:
        segments: list[PrefillSegment] = []
        self._is_blocked = False
        started = [r for r in self._running.values() if r.is_prefilling]
        for request in started:
            if budget == 0:
                return tuple(segments)
            segments.append(self._next_chunk(request, budget))
            budget -= segments[-1].num_tokens
        while budget and self._waiting:
            request = next(iter(self._waiting.values()))
            if segments and not self._may_share(segments, request):
                break
            if not self._start(request):
                self._is_blocked = True
                break
            segments.append(self._next_chunk(request, budget))
            budget -= segments[-1].num_tokens
        return tuple(segments)

    @staticmethod
    def _may_share(segments: list[PrefillSegment], request: Request) -> bool:
        """A larger step computes no more tokens a second, and whoever shares it waits for all of it. For one that
        decodes elsewhere nothing is gained by that: it waits for a step of its own, and the one before is sooner done.
        """
        num_tokens = sum(segment.num_tokens for segment in segments) + request.num_prompt_tokens
        return not request.hand_over or num_tokens <= FULL_STEP_TOKENS

    def _next_chunk(self, request: Request, budget: int) -> PrefillSegment:
        start = request.num_computed_tokens
        end = min(request.num_prompt_tokens, start + budget)
        self._pool.grow(request.request_id, self._pool.blocks_for(end))
        return PrefillSegment(request, start, end)

    def _start(self, request: Request) -> bool:
        """Move the head of the queue to running if a seat and its worst case in blocks are free."""
        attempt = (request.request_id, self._pool.committed)
        if not self.has_seat() or attempt == self._blocked_at:
            return False
        if not (self._fork(request) or self._open(request)):
            self._blocked_at = attempt
            return False
        del self._waiting[request.request_id]
        self.admit(request)
        return True

    def _open(self, request: Request) -> bool:
        """Give a request its first blocks: those that the prefix cache has."""
        max_blocks = self._pool.blocks_for(request.max_total_tokens)
        # The last token is always computed, because its logits are needed.
        # All are, when what the model makes of the prompt is wanted.
        reusable = 0 if request.wants_prompt_logprobs else request.num_prompt_tokens - 1
        hit = self._pool.match_prefix(request.token_ids, reusable)
        if not self._pool.can_admit(max_blocks, hit):
            return False
        request.block_table = self._pool.open(request.request_id, max_blocks, hit, Use.RUNNING)
        request.num_computed_tokens = request.num_cached_tokens = len(hit.blocks) * self._pool.block_size
        if request.hand_over:
            self._pool.grow(request.request_id, max_blocks)
        return True

    def _fork(self, request: Request) -> bool:
        """Share the blocks of a running request with the same prompt, all but its last token, which is computed anew.

        The block that this token is written to, if others read it, is copied first.
        """
        num_shared = request.num_prompt_tokens - 1
        parent = self._running.get(request.fork_of)
        if parent is None or request.hand_over or request.wants_prompt_logprobs:
            return False
        if parent.num_computed_tokens < num_shared or parent.token_ids[:num_shared] != request.token_ids[:num_shared]:
            return False
        max_blocks = self._pool.blocks_for(request.max_total_tokens)
        table = self._pool.fork(parent.request_id, request.request_id, num_shared, max_blocks)
        if table is None:
            return False
        if num_shared % self._pool.block_size:
            copy = self._pool.ensure_writable(request.request_id, len(table) - 1)
            self._copies += [copy] if copy is not None else []
        request.block_table = table
        request.num_computed_tokens = request.num_cached_tokens = num_shared
        return True
