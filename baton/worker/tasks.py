"""The background tasks of a worker: named, kept alive, their faults logged, all cancelled on stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

from baton.worker.faults import Faults

logger = logging.getLogger(__name__)


class Tasks:
    """Owned by one component on the asyncio thread. A task that raises is logged and is a fault of ours."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, coroutine: Coroutine[None, None, object], name: str) -> asyncio.Task[object]:
        task: asyncio.Task[object] = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def cancel_all(self) -> None:
        """Cancel every task and wait until each has ended."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._faults.add()
            logger.error("background task %s failed", task.get_name(), exc_info=fault)
