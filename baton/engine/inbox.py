"""The engine thread's door: commands come in from any thread, the engine thread waits for them here."""

from __future__ import annotations

import threading
from collections import deque

from baton.engine.ports import Command


class Inbox:
    """Thread-safe. One reader."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._commands: deque[Command] = deque()
        self._woken = False
        self._closed = False

    def post(self, command: Command) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def wake(self) -> None:
        """Let `wait` return even without a command."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until there is a command, a wake or the end; False when `timeout_s` passed before."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or self._woken or bool(self._commands), timeout_s)

    def is_closed(self) -> bool:
        with self._changed:
            return self._closed

    def drain(self) -> list[Command]:
        """All commands since the last call, in order."""
        with self._changed:
            commands = list(self._commands)
            self._commands.clear()
            self._woken = False
            return commands
