"""One attached router, as the worker sees it.

Created by the Attach service, used by attempts and halves on the asyncio thread. A worker numbers its sessions, and the
number is part of every engine request id: two routers, or one router before and after a broken stream, never collide.
"""

from __future__ import annotations

from collections import OrderedDict

from baton.worker.streams import Outbox
from kv_transfer.events import AttemptKey
from protos import worker_pb2 as pb

MAX_REMEMBERED_ATTEMPTS = 16384


class RouterSession:
    """The outlet to one router, and the memory of which of its attempts have ended."""

    def __init__(self, number: int, router_id: str) -> None:
        self.number = number
        self.router_id = router_id
        self.outbox: Outbox[pb.WorkerFrame] = Outbox()
        self._ended: OrderedDict[AttemptKey, None] = OrderedDict()

    def key(self, key: pb.AttemptKey) -> AttemptKey:
        """The attempt's name inside this worker: unique over all sessions."""
        return AttemptKey(f"{self.number}/{key.request_id}", key.attempt)

    def send(self, frame: pb.WorkerFrame) -> None:
        self.outbox.put(frame)

    def remember_ended(self, key: AttemptKey) -> None:
        """A command that repeats this key from now on is ignored."""
        self._ended[key] = None
        while len(self._ended) > MAX_REMEMBERED_ATTEMPTS:
            self._ended.popitem(last=False)

    def has_ended(self, key: AttemptKey) -> bool:
        return key in self._ended


def engine_id(key: AttemptKey) -> str:
    """The engine's request id of an attempt."""
    return f"{key.request_id}/{key.attempt}"
