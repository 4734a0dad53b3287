"""A thread that runs jobs in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class JobThread:
    """Runs jobs one after the other on one thread, in the order of `submit`. Jobs must not raise."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon: an operation that outlives every bound must not keep a dying process alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job. From any thread; jobs submitted after `close` never run."""
        self._jobs.put(job)

    def close(self, timeout_s: float) -> bool:
        """Run what is queued, end the thread and wait for it; whether it ended in time. Not from a job."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
