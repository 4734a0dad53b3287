"""How much the router takes in: a bounded number of running requests, a bounded queue before them, and the line of
requests that wait for room on the workers. Used by the dispatcher, on the event loop only.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import deque

from baton.common.errors import Overloaded

_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 30.0
_SMOOTHING = 0.1


class Admission:
    """Slots for running requests, first come first served. `parked` requests hold a slot but wait for a worker.

    Waiting for a slot and waiting for a worker count against the same bound.
    """

    def __init__(self, max_concurrent: int, max_queued: int) -> None:
        self._max_concurrent = max_concurrent
        self._max_queued = max_queued
        self._queue: deque[asyncio.Future[None]] = deque()
        self._mean_s = _MIN_RETRY_S
        self.running = 0
        self.parked = 0

    @property
    def queued(self) -> int:
        return len(self._queue) + self.parked

    async def acquire(self) -> None:
        """Take a slot, waiting for one in the queue. Raises Overloaded at once when the queue is full."""
        if self.running < self._max_concurrent and not self._queue:
            self.running += 1
            return
        self.check_queue()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._hand_on()
            elif turn in self._queue:
                self._queue.remove(turn)
            raise

    def release(self, held_s: float) -> None:
        """Give the slot back after `held_s` seconds; the oldest waiter gets it."""
        self._mean_s += _SMOOTHING * (held_s - self._mean_s)
        self._hand_on()

    def check_queue(self, retry_after_s: float | None = None) -> None:
        """Raise Overloaded when nobody more may wait."""
        if self.queued >= self._max_queued:
            wait = self._retry_after_s() if retry_after_s is None else max(retry_after_s, _MIN_RETRY_S)
            raise Overloaded(f"{self.running} requests are running and {self.queued} are queued", wait)

    def _hand_on(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1

    def _retry_after_s(self) -> float:
        expected = self._mean_s * (self.queued + 1) / self._max_concurrent
        return min(max(expected, _MIN_RETRY_S), _MAX_RETRY_S)


class WaitingLine:
    """Requests that wait for room on a worker, oldest first. Only the head is woken, so a wake-up is never a stampede.

    The head looks whether it can start; if so it leaves and wakes the next. Those for which no worker is there stand
    aside: they hold up nobody, and look when a worker comes or goes.
    """

    def __init__(self) -> None:
        self._tickets: list[int] = []
        self._wakeups: dict[int, asyncio.Event] = {}

    def is_blocked(self, ticket: int) -> bool:
        """An older request is waiting for room."""
        return bool(self._tickets) and self._tickets[0] < ticket

    def join(self, ticket: int) -> None:
        if ticket not in self._wakeups:
            insort(self._tickets, ticket)
            self._wakeups[ticket] = asyncio.Event()

    def stand_aside(self, ticket: int) -> None:
        """Until the next `wake_all`. Repeating it is a no-op."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self.wake()

    async def wait(self, ticket: int) -> None:
        """Return when something has changed for `ticket` since its last look."""
        event = self._wakeups[ticket]
        await event.wait()
        event.clear()

    def leave(self, ticket: int) -> None:
        """Unknown tickets are a no-op. The next in line gets a look."""
        if self._wakeups.pop(ticket, None) is not None:
            self.stand_aside(ticket)

    def wake(self) -> None:
        """Something changed on the workers: let the head look again."""
        if self._tickets:
            self._wakeups[self._tickets[0]].set()

    def wake_all(self) -> None:
        """A worker came or went: all are in line again and look whether they may go on waiting, and for what."""
        self._tickets = sorted(self._wakeups)
        for ticket in self._tickets:
            self._wakeups[ticket].set()
