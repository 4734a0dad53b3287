"""Joining a pair's process group without blocking the loop. Used by both halves, on the asyncio thread."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from functools import partial

from torch.distributed.distributed_c10d import Store

from baton.worker.half import WorkerContext
from baton.worker.threads import start_thread
from kv_transfer.connection import PairTransport, connect


async def join_pair(
    context: WorkerContext, launch_lock: threading.Lock, backend: str, store: Store, epoch: str, rank: int
) -> PairTransport:
    """Meet the peer under `epoch`. Raises TransferError or ConfigError.

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
