"""What has happened since the last report: collected by the engine thread, handed to `Ports.on_step` once per step."""

from __future__ import annotations

from baton.common.clock import Clock
from baton.common.sampling import TokenLogprobs
from baton.engine.ports import LifecycleEvent, RequestFailed, StepReport, TokenOutput
from baton.engine.request import Request


class StepLog:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._outputs: list[TokenOutput] = []
        self._events: list[LifecycleEvent] = []
        self._failures: list[RequestFailed] = []

    def __bool__(self) -> bool:
        return bool(self._outputs or self._events or self._failures)

    def output(
        self,
        request: Request,
        token_ids: tuple[int, ...],
        finish_reason: str | None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """The last of the request's tokens, which are `token_ids`, leave the engine."""
        position = request.num_emitted + request.num_output_tokens - len(token_ids)
        of_prompt = tuple(request.prompt_logprobs) if position == 0 else ()
        self._outputs.append(TokenOutput(request.request_id, position, token_ids, finish_reason, logprobs, of_prompt))

    def event(self, request_id: str, name: str) -> None:
        self._events.append(LifecycleEvent(request_id, name, self._clock.now()))

    def failure(self, request_id: str, code: str, reason: str) -> None:
        self._failures.append(RequestFailed(request_id, code, reason))

    def take(self, num_prefill_tokens: int, num_decode_seqs: int, seconds: float) -> StepReport:
        """The report of a finished step; the log starts anew."""
        outputs, events, failures = tuple(self._outputs), tuple(self._events), tuple(self._failures)
        self._outputs, self._events, self._failures = [], [], []
        return StepReport(outputs, events, failures, num_prefill_tokens, num_decode_seqs, seconds)
