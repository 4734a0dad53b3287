"""What the engine loop asks of a scheduling policy. Policies live beside this file, one per module."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from baton.engine.batch import ScheduledStep
from baton.engine.request import Request


class Scheduler(Protocol):
    """Owns the waiting and running queues and takes blocks from the pool. Engine thread only; no torch, no wall clock.

    A request is in at most one queue. The scheduler gives a request its blocks; the request book takes them back.
    """

    @property
    def waiting(self) -> Collection[Request]: ...

    @property
    def running(self) -> Collection[Request]: ...

    @property
    def is_blocked(self) -> bool:
        """Whether the last `schedule` left a request waiting for blocks or a seat. Then new leases are refused."""
        ...

    def has_seat(self) -> bool:
        """Whether one more request could run beside those that run or have a seat reserved."""
        ...

    def reserve_seat(self, owner: str) -> None:
        """Keep a seat for a hand-over that is on its way."""
        ...

    def free_seat(self, owner: str) -> None:
        """Give a reserved seat back; unknown owners are a no-op."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request that has neither KV nor blocks."""
        ...

    def admit(self, request: Request) -> None:
        """Take in a request that has its blocks and its prompt's KV. It decodes from the next step on."""
        ...

    def remove(self, request: Request) -> None:
        """Drop a request from the queue that it is in, if any. Its blocks stay."""
        ...

    def schedule(self) -> ScheduledStep:
        """Choose the next step and take the blocks that it needs. Empty when nothing can run now."""
        ...
