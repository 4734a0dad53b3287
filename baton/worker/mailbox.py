"""From any thread to the asyncio thread, in order and in batches.

The engine thread and the transfer threads post their results here; the loop is woken once for all that waits, not once
per item.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from baton.worker.faults import Faults

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Mailbox(Generic[T]):
    """`handle` is called on the loop's thread with each item, in the order of `post`. After `close` items are dropped.

    An item that cannot be handled is a fault of ours; the others still arrive.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, handle: Callable[[T], None], faults: Faults) -> None:
        self._loop = loop
        self._handle = handle
        self._faults = faults
        self._lock = threading.Lock()
        self._items: list[T] = []
        self._closed = False

    def post(self, item: T) -> None:
        """Never waits for the loop. From any thread."""
        with self._lock:
            if self._closed:
                return
            self._items.append(item)
            if len(self._items) == 1:
                self._loop.call_soon_threadsafe(self._deliver)

    def close(self) -> None:
        """Call before the loop ends: `post` would wake a closed loop otherwise."""
        with self._lock:
            self._closed = True
            self._items.clear()

    def _deliver(self) -> None:
        with self._lock:
            items, self._items = self._items, []
        for item in items:
            try:
                self._handle(item)
            except Exception:
                self._faults.add()
                logger.exception("%s could not be handled", type(item).__name__)
