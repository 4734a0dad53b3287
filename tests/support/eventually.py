"""Waits of tests for what other tasks bring about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

WAIT_S = 20.0


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0)
