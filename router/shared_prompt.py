"""One prompt with several choices: one of them has it computed and handed over, the others go where it lies then.

Used by the generations of one prompt, on the event loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from router.worker_session import AttemptId


@dataclass(frozen=True, slots=True)
class PromptPlace:
    """`attempt` runs, or has run, on `worker_id` and has left the prompt's KV there."""

    worker_id: str
    attempt: AttemptId


class SharedPrompt:
    """A turn is a leader's until it tells where the prompt lies or gives up; then the next in line leads."""

    def __init__(self) -> None:
        self._place: PromptPlace | None = None
        self._lead = asyncio.Lock()

    async def turn(self) -> PromptPlace | None:
        """Where the prompt lies; None makes the caller the leader, who must call `settle`."""
        await self._lead.acquire()
        if self._place is not None:
            self._lead.release()
        return self._place

    def settle(self, place: PromptPlace | None) -> None:
        """The leader says where the prompt lies, or that it ends without having placed it."""
        self._place = place
        self._lead.release()
