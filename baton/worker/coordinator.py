"""Runs one end of the hand-over protocol: feeds events to the pure state machine, executes the actions it returns.

Asyncio thread only. One coordinator per half; `kv_transfer.protocol` says what it owes the machine.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from baton.worker.faults import Faults

logger = logging.getLogger(__name__)
S = TypeVar("S")
E = TypeVar("E")
A = TypeVar("A")

TICK_S = 0.2


class Coordinator(Generic[S, E, A]):
    """Holds the state. Events that arise while actions are executed are handled after them, in order."""

    def __init__(
        self,
        state: S,
        step: Callable[[S, E], tuple[S, tuple[A, ...]]],
        execute: Callable[[A], None],
        faults: Faults,
    ) -> None:
        self.state = state
        self._step = step
        self._execute = execute
        self._faults = faults
        self._events: deque[E] = deque()
        self._running = False

    def feed(self, event: E) -> None:
        """Take an event and do all that follows from it. An action that fails does not keep others from running.

        An event on which the machine fails changes nothing; whoever feeds, timers too, goes on.
        """
        self._events.append(event)
        if self._running:
            return
        self._running = True
        try:
            while self._events:
                for action in self._try_step(self._events.popleft()):
                    self._try(action)
        finally:
            self._running = False

    def _try_step(self, event: E) -> tuple[A, ...]:
        try:
            self.state, actions = self._step(self.state, event)
        except Exception:
            self._faults.add()
            logger.exception("%s could not be handled", event)
            return ()
        return actions

    def _try(self, action: A) -> None:
        try:
            self._execute(action)
        except Exception:
            self._faults.add()
            logger.exception("%s could not be executed", action)
