"""Finding a place for an attempt: ask the policy, and while nothing can start, wait in line. Used by the dispatcher."""

from __future__ import annotations

import asyncio
import contextlib

from baton.common.clock import Clock
from baton.common.config import RouterConfig
from baton.common.errors import Unavailable
from router.admission import Admission, WaitingLine
from router.policy import Decision, Predicted, RequestFacts, Wait, decide
from router.registry import Registry
from router.shared_prompt import PromptPlace

WORKER_WAIT_S = 30.0


class Placement:
    """Shared by all requests of a dispatcher."""

    def __init__(self, config: RouterConfig, registry: Registry, admission: Admission, clock: Clock) -> None:
        self._config = config
        self._registry = registry
        self._admission = admission
        self._clock = clock
        self._line = WaitingLine()
        registry.subscribe(self._line.wake)
        registry.subscribe_to_workers(self._line.wake_all)

    async def find(self, ticket: int, facts: RequestFacts, *, may_be_refused: bool) -> Decision:
        """A decision that can start now. `ticket` orders requests by age.

        Raises Overloaded when nobody more may wait (unless tokens are out already: then the request is not refused),
        and Unavailable when no worker that could take it comes up within WORKER_WAIT_S.
        """
        choice = self._choose(ticket, facts)
        if isinstance(choice, Decision):
            return choice
        if may_be_refused:
            self._admission.check_queue()
        self._admission.parked += 1
        self._line.join(ticket)
        try:
            return await self._wait(ticket, facts, choice)
        finally:
            self._admission.parked -= 1
            self._line.leave(ticket)

    def beside(self, place: PromptPlace) -> Decision | None:
        """The worker that has a prompt's KV, if it takes requests now."""
        for worker in self._registry.snapshot().workers:
            if worker.worker_id == place.worker_id and worker.has_room:
                reason = f"shares the prompt of {place.attempt[0]}"
                return Decision("local", reason, Predicted(), worker.worker_id)
        return None

    async def _wait(self, ticket: int, facts: RequestFacts, choice: Decision | Wait) -> Decision:
        no_worker_since: float | None = None
        while isinstance(choice, Wait):
            now = self._clock.now()
            patience_s: float | None = None
            if choice.no_worker:
                self._line.stand_aside(ticket)
                no_worker_since = now if no_worker_since is None else no_worker_since
                patience_s = self._patience_s(choice, now - no_worker_since)
            else:
                no_worker_since = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self._line.wait(ticket)
            choice = self._choose(ticket, facts)
        return choice

    def _patience_s(self, choice: Wait, waited_s: float) -> float:
        """How much longer to wait for a worker. Raises Unavailable when it has been long enough.

        A cluster that has had workers gets them back, even if right now it has no member.
        """
        expected = self._registry.members or self._registry.has_had_workers
        if not expected or waited_s >= WORKER_WAIT_S:
            waited = f", nor came up within {waited_s:.0f} s" if waited_s >= 1 else ""
            raise Unavailable(f"{choice.reason}{waited}")
        return WORKER_WAIT_S - waited_s

    def _choose(self, ticket: int, facts: RequestFacts) -> Decision | Wait:
        """The policy's choice; a hand-over does not overtake an older request that waits for room."""
        config = self._config
        choice = decide(config.policy, facts, self._registry.snapshot(), config.prefill_queue_s)
        if isinstance(choice, Decision) and choice.path == "remote" and self._line.is_blocked(ticket):
            return Wait("older requests are waiting")
        return choice
