"""The requests and reservations that an engine knows, and every change of their phase together with their blocks.

Engine thread only. Blocks are given back here and nowhere else, and not before every launched step that uses them has
ended: a step in flight never loses a block, to whomever it would go.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from baton.common import events
from baton.common.sampling import TokenLogprobs
from baton.engine.block_pool import BlockPool, Use
from baton.engine.ports import (
    Abort,
    AddRequest,
    Admission,
    Command,
    Refusal,
    Release,
    Reservation,
    Reserve,
)
from baton.engine.request import Phase, Request
from baton.engine.schedulers.base import Scheduler
from baton.engine.step_log import StepLog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Reserved:
    token_ids: list[int]
    max_total_tokens: int


class RequestBook:
    """Executes commands and ends requests. What the outside has to hear goes into the step log."""

    def __init__(
        self, pool: BlockPool, scheduler: Scheduler, log: StepLog, *, max_model_len: int, vocab_size: int
    ) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._log = log
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._requests: dict[str, Request] = {}
        self._reserved: dict[str, _Reserved] = {}
        self._retiring: dict[str, Request] = {}

    def handle(self, command: Command) -> None:
        match command:
            case AddRequest(request):
                self._add(request)
            case Reserve():
                self._reserve(command)
            case Admission():
                self._admit(command)
            case Release(id):
                self._release(id)
            case Abort(request_id):
                self._abort(request_id)

    def reject(self, command: Command, reason: str) -> None:
        """The command went wrong inside the engine: whoever it would have started ends here and holds nothing."""
        match command:
            case Reserve(owner) if owner not in self._reserved:
                self._give_back(owner)
                command.reply(Refusal("internal", reason))
            case AddRequest(request) | Admission(request=request) if not self._is_known(request.request_id):
                self._give_back(request.request_id)
                self._log.failure(request.request_id, "internal", reason)

    def _give_back(self, owner: str) -> None:
        if self._pool.holds(owner):
            self._pool.release(owner)

    @property
    def has_reservations(self) -> bool:
        """Whether admissions are expected."""
        return bool(self._reserved)

    def unfinished(self) -> list[Request]:
        """Requests that are queued or running."""
        return [request for request in self._requests.values() if request.phase in (Phase.WAITING, Phase.RUNNING)]

    def landed(self, request: Request) -> None:
        """A step that used the request's blocks has ended."""
        request.steps_in_flight -= 1
        if request.steps_in_flight == 0 and self._retiring.pop(request.request_id, None) is not None:
            self._pool.release(request.request_id)

    # ---- in

    def _add(self, request: Request) -> None:
        if self._is_known(request.request_id):
            raise ValueError(f"request {request.request_id} is known already")
        fault = self._fault(request.token_ids, request.max_total_tokens)
        if fault is not None:
            self._log.failure(request.request_id, "invalid", fault)
            return
        self._requests[request.request_id] = request
        self._scheduler.add(request)
        self._log.event(request.request_id, events.QUEUED)

    def _reserve(self, command: Reserve) -> None:
        command.reply(self._try_reserve(command))

    def _try_reserve(self, command: Reserve) -> Reservation | Refusal:
        owner, tokens = command.reservation_id, command.token_ids
        if self._pool.holds(owner):
            return Refusal("invalid", f"{owner} holds blocks already")
        fault = self._fault(tokens, command.max_total_tokens)
        if fault is not None:
            return Refusal("invalid", fault)
        if self._scheduler.is_blocked or not self._scheduler.has_seat():
            return Refusal("busy", "other requests wait for their turn")
        max_blocks = self._pool.blocks_for(command.max_total_tokens)
        hit = self._pool.match_prefix(tokens, len(tokens))
        if not self._pool.can_admit(max_blocks, hit):
            return Refusal("busy", f"{max_blocks} blocks are not free beside the growth of other requests")
        table = self._pool.open(owner, max_blocks, hit, Use.LEASED)
        generation = self._pool.grow(owner, self._pool.blocks_for(len(tokens)))
        self._scheduler.reserve_seat(owner)
        self._reserved[owner] = _Reserved(tokens, command.max_total_tokens)
        return Reservation(tuple(table), len(hit.blocks), generation)

    def _admit(self, admission: Admission) -> None:
        request, owner = admission.request, admission.reservation_id
        if self._is_known(request.request_id):
            raise ValueError(f"request {request.request_id} is known already")
        reserved = self._reserved.pop(owner, None)
        if reserved is None:
            self._log.failure(request.request_id, "expired", f"reservation {owner} has ended")
            return
        self._scheduler.free_seat(owner)
        if request.token_ids != reserved.token_ids or request.max_total_tokens > reserved.max_total_tokens:
            self._pool.release(owner)
            self._log.failure(request.request_id, "internal", f"reservation {owner} was made for another request")
            return
        request.block_table = self._pool.rename(owner, request.request_id)
        self._pool.move(request.request_id, Use.RUNNING)
        self._pool.register(request.request_id, request.token_ids, request.num_prompt_tokens)
        request.num_computed_tokens = request.num_prompt_tokens
        request.token_ids.append(admission.first_token)
        self._requests[request.request_id] = request
        self._scheduler.admit(request)
        self._log.event(request.request_id, events.ADMITTED)
        reason = request.finish_reason()
        if reason is not None:
            self.finish(request, (), reason)

    def _is_known(self, request_id: str) -> bool:
        return request_id in self._requests or request_id in self._retiring

    def _fault(self, token_ids: list[int], max_total_tokens: int) -> str | None:
        """Why a sequence can never be served here, or None."""
        if not token_ids:
            return "the prompt is empty"
        if not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            return f"token ids must lie in [0, {self._vocab_size})"
        if max_total_tokens > self._max_model_len:
            return f"{max_total_tokens} tokens are more than the maximum of {self._max_model_len}"
        if self._pool.blocks_for(max_total_tokens) > self._pool.num_blocks:
            return f"{max_total_tokens} tokens need more blocks than the {self._pool.num_blocks} that there are"
        return None

    # ---- out

    def finish(
        self,
        request: Request,
        token_ids: tuple[int, ...],
        reason: str,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """The request has its last tokens, which are `token_ids`."""
        self._log.output(request, token_ids, reason, logprobs)
        self._log.event(request.request_id, events.FINISHED)
        self._end(request)

    def fail(self, request: Request, code: str, reason: str) -> None:
        self._log.failure(request.request_id, code, reason)
        self._end(request)

    def hand_over(self, request: Request) -> None:
        """The engine's work on a hand-over has ended: the blocks stay, as leased, until Release."""
        self._scheduler.remove(request)
        self._pool.move(request.request_id, Use.LEASED)
        request.phase = Phase.HANDED_OVER

    def _abort(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is not None and request.phase is not Phase.HANDED_OVER:
            self._end(request)

    def _release(self, owner: str) -> None:
        request = self._requests.get(owner)
        if request is not None and request.hand_over:
            self._scheduler.remove(request)
            self._forget(request)
        elif self._reserved.pop(owner, None) is not None:
            self._scheduler.free_seat(owner)
            self._pool.release(owner)

    def _end(self, request: Request) -> None:
        """Leave the queues. The blocks go too, except those of a hand-over, which a transfer may still read."""
        self._scheduler.remove(request)
        if request.hand_over and self._pool.holds(request.request_id):
            self.hand_over(request)
        else:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        request.phase = Phase.FINISHED
        if not self._pool.holds(request.request_id):
            return
        if request.steps_in_flight:
            self._retiring[request.request_id] = request
        else:
            self._pool.release(request.request_id)
