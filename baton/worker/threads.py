"""Blocking calls beside the asyncio loop, each on a thread of its own.

Connecting and tearing down a KV connection may block for seconds; in a shared pool a few stuck peers would hold up all
others, and everything else that uses the pool.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start_thread(call: Callable[[], T], name: str) -> Future[T]:
    """Start `call` on a daemon thread: one that blocks for ever must not keep a dying process alive."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 (whoever waits gets it)
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome


async def run_in_thread(call: Callable[[], T], name: str) -> T:
    """Await `call` on its own thread. Cancelling the wait leaves the thread to end by itself."""
    return await asyncio.wrap_future(start_thread(call, name))
