"""Notices an engine that has work and makes no step, as one whose device hangs. Started by the shell if configured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.engine.ports import EngineStats

_LOOKS_PER_TIMEOUT = 8


async def watch_for_stall(
    stats: Callable[[], EngineStats], timeout_s: float, on_stalled: Callable[[str], None]
) -> None:
    """Calls `on_stalled` once, when no step has ended for `timeout_s`, and returns. Asyncio thread.

    Counts only time in which this process was awake: after a pause of the whole process its engine just goes on.
    """
    period, stalled = timeout_s / _LOOKS_PER_TIMEOUT, 0.0
    while stalled < timeout_s:
        await asyncio.sleep(period)
        stalled = stalled + period if stats().progress_age >= period else 0.0
    on_stalled(f"the engine has work and made no step for {timeout_s:g} s")
