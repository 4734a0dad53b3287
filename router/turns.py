"""So that whoever has much to do on the event loop does not hold up the others. Used where answers are made."""

from __future__ import annotations

import asyncio
from typing import Final

TURN_S: Final = 0.005


class Turns:
    """Of one task that works in small steps. Counts what it waited for as work, so it may give way once too often."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()

    async def give_way(self) -> None:
        """Between two steps: let the others run, if this turn has lasted long enough."""
        if self._loop.time() - self._began > TURN_S:
            await asyncio.sleep(0)
            self._began = self._loop.time()
