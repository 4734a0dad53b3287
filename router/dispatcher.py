"""The request state machine: read this first.

    submit ▶ wait for a slot (admission) ▶ find a place (policy) ▶ attempt ▶ finished
                                                 ▲                   │ refused, failed, worker lost
                                                 └───────────────────┘ prompt + emitted tokens, a new attempt

A request has one `Generation` (generation.py): a task that makes attempts one after the other, and the `Output` that
they write to. An emitted token is never retracted, repeated or skipped: every attempt starts behind the tokens already
emitted, and lets each position pass once (attempt.py, token_fence.py). A request gets exactly one terminal event: its
finish reason, or an error. Choices with one prompt are generations of their own, of which one has the prompt computed
(shared_prompt.py). Event loop only; used by submitter.py.
"""

from __future__ import annotations

import asyncio
from itertools import count

from baton.common.clock import Clock
from baton.common.config import RouterConfig
from baton.common.errors import Unavailable
from router.admission import Admission
from router.generation import Generation
from router.metrics import Metrics
from router.placement import Placement
from router.record import RecentRequests
from router.registry import Registry
from router.shared_prompt import SharedPrompt
from router.types import GenerationRequest, belongs_to


class Dispatcher:
    """Owns all generations and what they share."""

    def __init__(
        self, config: RouterConfig, registry: Registry, recent: RecentRequests, metrics: Metrics, clock: Clock
    ) -> None:
        self.config = config
        self.registry = registry
        self.recent = recent
        self.metrics = metrics
        self.clock = clock
        self.admission = Admission(config.max_concurrent, config.max_queued)
        self.placement = Placement(config, registry, self.admission, clock)
        self.last_progress_at = clock.now()
        self.draining = False
        self._tickets = count()
        self._generations: dict[str, Generation] = {}
        metrics.running.set_function(lambda: self.admission.running)
        metrics.queued.set_function(lambda: self.admission.queued)

    def submit(self, request: GenerationRequest, prompt: SharedPrompt | None = None) -> Generation:
        """Start a request; whoever submits must `close` it. Choices with one prompt share `prompt`.

        Raises Unavailable while draining.
        """
        if self.draining:
            raise Unavailable("the server is shutting down")
        if self.is_idle:
            self.last_progress_at = self.clock.now()
        generation = Generation(self, request, next(self._tickets), prompt)
        self._generations[request.request_id] = generation
        return generation

    def cancel(self, request_id: str) -> bool:
        """Cancel a running request, or all that belong to the API request of this id; False if none does."""
        running = [one for id_, one in self._generations.items() if belongs_to(id_, request_id)]
        for generation in running:
            generation.close()
        return bool(running)

    @property
    def is_idle(self) -> bool:
        return not self._generations

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let what runs finish for `timeout_s`, then cancel the rest."""
        self.draining = True
        running = list(self._generations.values())
        if running:
            await asyncio.wait([generation.task for generation in running], timeout=timeout_s)
        for generation in running:
            generation.abort(Unavailable("the server is shutting down"))
        await asyncio.gather(*(generation.task for generation in running), return_exceptions=True)

    def ended(self, generation: Generation) -> None:
        """Called once by every generation."""
        self._generations.pop(generation.request.request_id, None)
        self.last_progress_at = self.clock.now()
        self.recent.end(generation.record)
