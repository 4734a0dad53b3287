"""A thread that runs jobs in order, urgent ones first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], None]


class JobThread:
    """Runs jobs one after the other on one thread: urgent ones in the order of `submit`, then the others in theirs.

    Jobs must not raise.
    """

    def __init__(self, name: str) -> None:
        self._urgent: deque[Job] = deque()
        self._others: deque[Job] = deque()
        self._goes_on: SimpleQueue[bool] = SimpleQueue()  # one True for each job
        # A daemon: an operation that outlives every bound must not keep a dying process alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job, is_urgent: bool = False) -> None:
        """Queue a job. From any thread; jobs submitted after `close` never run."""
        (self._urgent if is_urgent else self._others).append(job)
        self._goes_on.put(True)

    def close(self, timeout_s: float) -> bool:
        """Run what is queued, end the thread and wait for it; whether it ended in time. Not from a job."""
        self._goes_on.put(False)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._goes_on.get():
            (self._urgent or self._others).popleft()()
