"""The count of the worker's own defects that were caught and logged on the way. Any of them turns its health bad."""

from __future__ import annotations


class Faults:
    """One per worker, asyncio thread. A worker with a fault goes on serving until its supervisor replaces it."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1
