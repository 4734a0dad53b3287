"""One request from submission to its single terminal event: its attempts, and what becomes of their outcomes.

Made by dispatcher.py, where the picture is; event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from baton.common import events
from baton.common.clock import Clock
from baton.common.config import RouterConfig
from baton.common.errors import BatonError, DeadlineExceeded, InvalidRequest, Unavailable
from protos import worker_pb2 as pb
from router.admission import Admission
from router.attempt import Attempt, Failed, Finished, Outcome, Refused
from router.metrics import Metrics
from router.output import Output
from router.pairs import HandOver
from router.placement import Placement
from router.policy import Decision, RequestFacts
from router.record import RecentRequests, RequestRecord
from router.registry import Registry
from router.request_spec import spec_of
from router.shared_prompt import PromptPlace, SharedPrompt
from router.types import GenerationRequest, ReaderTooSlow, RequestCancelled, TokenEvent
from router.worker_session import AttemptId

MAX_UNREAD_TOKENS = 8192
_PAIR_FAULTS = frozenset({"peer_lost", "corrupt", "incomplete", "aborted", "no_connection", "unknown_lease"})
_log = logging.getLogger("baton.router")


class Shared(Protocol):
    """What all generations share: the dispatcher. `last_progress_at` is on `clock`."""

    config: RouterConfig
    registry: Registry
    recent: RecentRequests
    metrics: Metrics
    clock: Clock
    admission: Admission
    placement: Placement
    last_progress_at: float

    def ended(self, generation: Generation) -> None:
        """Called once by every generation."""
        ...


class Generation:
    """An async iterator of TokenEvent.

    Iterating yields the tokens, then raises the error that ended it, if any. `close` frees the workers at once,
    whatever the state, and is a no-op once the request is over.
    """

    def __init__(self, shared: Shared, request: GenerationRequest, ticket: int, prompt: SharedPrompt | None) -> None:
        self.request = request
        self.record = RequestRecord(request.request_id, len(request.token_ids), shared.clock, shared.clock.now())
        self._shared = shared
        self._ticket = ticket
        self.prompt_logprobs: Sequence[pb.TokenLogprobs] = ()
        self._output = Output(self.record, shared.metrics, shared.clock)
        self._attempt: Attempt | None = None
        self._hand_over: HandOver | None = None
        self._keep_local = ""
        self._prompt = prompt
        self._leads = False
        self._fork_of: AttemptId | None = None
        shared.recent.begin(self.record)
        if request.sampling.choice == 0:
            shared.metrics.prompt_tokens.inc(len(request.token_ids))
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._on_task_done)

    # ---- for the reader

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> TokenEvent:
        event = await self._output.next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def first_token(self) -> None:
        """Returns once a token is out, or it is over. Raises the error that ended it without any."""
        await self._output.first_token()

    @property
    def decision(self) -> Decision | None:
        """Path and reason of the attempt that delivered the first token, or of the latest one before that."""
        return self.record.decision

    def finish(self, num_tokens: int) -> None:
        """A stop string ended the request with its first `num_tokens` tokens: later ones do not count."""
        self._end_attempt(Finished("stop"))
        self._output.finish("stop")
        self.record.finish_reason, self.record.num_output_tokens = "stop", num_tokens
        self.task.cancel()  # it may be waiting for a place for its next attempt

    def close(self) -> None:
        self.abort(RequestCancelled("the request was cancelled"))

    def abort(self, error: BatonError) -> None:
        """End it with an error, at once. A no-op once it is over."""
        self._output.fail(error)
        self._end_attempt(Failed("cancelled", str(error), retryable=False))
        self.task.cancel()

    # ---- the life of a request

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(self.request.timeout_s):
                await self._with_slot()
        except TimeoutError:
            self._output.fail(DeadlineExceeded(f"the request did not end within {self.request.timeout_s:g} s"))
        except BatonError as error:
            self._output.fail(error)

    async def _with_slot(self) -> None:
        admission, clock = self._shared.admission, self._shared.clock
        self.record.mark(events.QUEUED)
        await admission.acquire()
        started = clock.now()
        try:
            await self._serve()
        finally:
            admission.release(clock.now() - started)

    async def _serve(self) -> None:
        """Attempts until one finishes. The count of failures starts again whenever a token was emitted."""
        failures, num_emitted = 0, 0
        while not self._output.is_over:
            decision = await self._place()
            outcome = await self._attempt_once(decision)
            if isinstance(outcome, Finished):
                return
            if len(self._output.emitted) > num_emitted:
                failures, num_emitted = 0, len(self._output.emitted)
            failures += self._counts(outcome)
            if failures >= self._shared.config.max_attempts:
                raise Unavailable(f"{failures} attempts failed, the last one with: {outcome.message}")

    async def _place(self) -> Decision:
        place = await self._place_of_prompt() if not self.record.attempts else None
        if place is not None and (decision := self._shared.placement.beside(place)) is not None:
            self._fork_of = place.attempt
            return decision
        self._fork_of = None
        num_tokens = len(self.request.token_ids) + len(self._output.emitted)
        facts = RequestFacts(num_tokens, self._num_tokens_left, self._keep_local)
        return await self._shared.placement.find(self._ticket, facts, may_be_refused=not self._output.emitted)

    async def _place_of_prompt(self) -> PromptPlace | None:
        """Where another choice has had the prompt computed; None when this one is to do so."""
        if self._prompt is None:
            return None
        place = await self._prompt.turn()
        self._leads = place is None
        return place

    def _settle_prompt(self, place: PromptPlace | None) -> None:
        if self._prompt is not None and self._leads:
            self._leads = False
            self._prompt.settle(place)

    async def _attempt_once(self, decision: Decision) -> Outcome:
        """Run one attempt to its outcome. However this is left, no worker keeps the attempt."""
        registry = self._shared.registry
        session, prefill = registry.session, decision.prefill_worker
        self._hand_over = None
        if prefill is not None:
            crosses = self._num_tokens_left > 1
            self._hand_over = registry.pairs.begin(prefill, decision.worker, may_prove=crosses)
        number = len(self.record.attempts) + 1
        record = self.record.begin_attempt(number, decision)
        attempt = self._attempt = Attempt(
            (self.request.request_id, number),
            self._spec(),
            session(decision.worker),
            session(prefill) if prefill else None,
            self.record,
            self,
            self._fork_of,
        )
        attempt.start()
        try:
            await attempt.wait()
        finally:
            outcome = attempt.end(Failed("cancelled", "the request was given up", retryable=False))
            record.outcome = str(outcome)
            self._shared.metrics.attempts.labels(decision.path, outcome.code).inc()
            self._learn(outcome, had_token=attempt.first_token_is_out)
        return outcome

    def _spec(self) -> pb.RequestSpec:
        emitted = self._output.emitted
        elapsed_s = self._shared.clock.now() - self.record.received_at
        return spec_of(self.request, emitted, max(self.request.timeout_s - elapsed_s, 0.001))

    @property
    def _num_tokens_left(self) -> int:
        return self.request.sampling.max_tokens - len(self._output.emitted)

    def _counts(self, outcome: Refused | Failed) -> int:
        """1 if it counts against max_attempts, else 0. Raises what no other attempt could mend."""
        if isinstance(outcome, Refused):
            return self._refusal_counts(outcome)
        if outcome.code == "deadline":
            raise DeadlineExceeded(outcome.message)
        if not outcome.retryable:
            raise Unavailable(f"the worker failed: {outcome.message}")
        return 1

    def _refusal_counts(self, refused: Refused) -> int:
        """A full worker costs no attempt: the request waits for room, or is refused if nobody more may wait."""
        if refused.code == "invalid":
            raise InvalidRequest(refused.message)
        if refused.code == "busy" and not self._output.emitted:
            self._shared.admission.check_queue(refused.retry_after_s)
        return 0 if refused.code in ("busy", "draining") else 1

    def _learn(self, outcome: Outcome, *, had_token: bool) -> None:
        """A hand-over that failed rests its pair and keeps this request on one worker.

        One that expired before its first token says nothing of the pair: it waited, or its prompt took too long.
        """
        if self._hand_over is None:
            return
        has_expired = outcome.code == "expired"
        if outcome.code in _PAIR_FAULTS or (has_expired and had_token):
            self._hand_over.failed(self._shared.clock.now(), str(outcome))
        else:
            self._hand_over.given_up()
        if outcome.code in _PAIR_FAULTS or has_expired:
            self._keep_local = f"local because the hand-over failed ({outcome.code})"

    # ---- tokens and the end

    def on_tokens(self, news: TokenEvent) -> None:
        """Called by the current attempt."""
        if self._output.is_over:
            return
        if news.token_ids:
            self._output.add(news.token_ids, news.logprobs)
            self._shared.last_progress_at = self._output.last_token_at
        if news.finish_reason is not None:
            self._output.finish(news.finish_reason)
        elif self._output.num_unread > MAX_UNREAD_TOKENS:
            self.abort(ReaderTooSlow(f"{MAX_UNREAD_TOKENS} tokens were waiting to be read"))

    def on_prompt_logprobs(self, logprobs: Sequence[pb.TokenLogprobs]) -> None:
        """Called by the attempt that delivers the first token."""
        self.prompt_logprobs = logprobs

    def on_prompt_placed(self, worker_id: str) -> None:
        """Called by the current attempt, with every output of its worker."""
        if self._hand_over is not None:
            self._hand_over.succeeded()
        if self._leads:
            self._settle_prompt(PromptPlace(worker_id, (self.request.request_id, len(self.record.attempts))))

    def _end_attempt(self, outcome: Outcome) -> None:
        if self._attempt is not None:
            self._attempt.end(outcome)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """The last resort for the one terminal event: the task was cancelled from outside, or has a defect."""
        self._settle_prompt(None)
        if not task.cancelled() and (defect := task.exception()) is not None:
            _log.error("a defect in the router ended request %s", self.request.request_id, exc_info=defect)
            self.abort(Unavailable("internal error"))
        self.abort(RequestCancelled("the request was cancelled"))
        self._shared.ended(self)
