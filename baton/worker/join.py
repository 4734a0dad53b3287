"""Joining a pair's process group without blocking the loop, now or when it is used. By both halves, asyncio thread."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from functools import partial

from torch.distributed.distributed_c10d import Store

from baton.worker.half import WorkerContext
from baton.worker.threads import start_thread
from kv_transfer.connection import PairTransport, connect
from kv_transfer.lazy import LazyTransport


class ConnectedAhead:
    """The pairs whose process group is made when they register: at most as many as there is memory set aside for."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pairs: set[str] = set()

    def enter(self, pair: str) -> bool:
        """Whether the pair is one of them, now that it registers; others connect when they are used."""
        if len(self._pairs) < self._most:
            self._pairs.add(pair)
        return pair in self._pairs

    def leave(self, pair: str) -> None:
        self._pairs.discard(pair)


async def join_pair(
    context: WorkerContext,
    launch_lock: threading.Lock,
    backend: str,
    store: Store,
    epoch: str,
    rank: int,
    when_used: bool,
) -> PairTransport:
    """Meet the peer under `epoch`; with `when_used`, at the first operation. Raises TransferError or ConfigError.

    When the wait is cancelled the thread gives up soon, and what it may still bring is closed.
    """
    cancel = threading.Event()
    call = partial(
        connect,
        backend,
        store,
        epoch,
        rank,
        host=context.host,
        device=context.device,
        connect_timeout_s=context.config.transfer.connect_timeout_s,
        operation_timeout_s=context.config.transfer.operation_timeout_s,
        launch_lock=launch_lock,
        cancel=cancel,
        max_ctas=context.config.transfer.max_ctas,
    )
    if when_used:
        return context.injector.transport(LazyTransport(call, cancel))
    joining = start_thread(call, f"join {epoch}")
    waiting = asyncio.wrap_future(joining)
    try:
        return context.injector.transport(await asyncio.shield(waiting))
    except asyncio.CancelledError:
        cancel.set()
        joining.add_done_callback(_close_unused)
        waiting.add_done_callback(_retrieve)
        raise


def _close_unused(joining: Future[PairTransport]) -> None:
    if joining.exception() is None:
        joining.result().close()


def _retrieve(waiting: asyncio.Future[PairTransport]) -> None:
    """Nobody waits any more: asyncio need not warn of how it ended."""
    if not waiting.cancelled():
        waiting.exception()
