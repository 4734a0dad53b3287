"""A whole serving cluster in one place: the router in this process, the workers as Ray actors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from baton.cluster.controller import WorkerAddress
from baton.cluster.layout import ClusterLayout, choose_layout
from baton.cluster.ray_session import count_gpus, ray_session
from baton.cluster.supervisor import Supervisor
from baton.common.config import BatonConfig
from baton.common.errors import BatonError
from baton.engine.models.source import pinned, resolve_model
from router.registry import Member
from router.server import Router

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServingCluster:
    """A running cluster. `router` answers clients; `supervisor` holds the workers."""

    config: BatonConfig
    layout: ClusterLayout
    router: Router
    supervisor: Supervisor


@contextlib.asynccontextmanager
async def serving_cluster(
    config: BatonConfig, announce: Callable[[str], None] = log.info, *, show_worker_logs: bool = True
) -> AsyncIterator[ServingCluster]:
    """Start router and workers; inside the block the cluster serves. On leaving, requests drain and all is stopped.

    A model of the hub is fetched first. The router listens before Ray is up: `/health` answers at once and `/ready`
    when a decode worker is attached.
    `announce` gets one line per stage, for people. Raises ConfigError or BatonError with what to change.
    """
    model_dir = await asyncio.to_thread(resolve_model, config.model, config.revision)
    config = pinned(_with_worker_host(config), model_dir)
    async with contextlib.AsyncExitStack() as stack:
        router = Router(config.model_copy(update={"model": str(model_dir)}))
        await router.start()
        stack.push_async_callback(router.stop)
        announce(f"router on http://{config.server.host}:{router.http_port}, grpc {router.grpc_port}; starting Ray")
        ray_context = ray_session(config, show_worker_logs)
        await asyncio.to_thread(ray_context.__enter__)
        _restore_sigterm()
        stack.push_async_callback(asyncio.to_thread, ray_context.__exit__, None, None, None)
        layout = choose_layout(config, count_gpus())
        announce(layout.describe())
        supervisor = Supervisor(config, layout, lambda members: router.registry.set_members(_members(members)))
        stack.push_async_callback(supervisor.stop)
        await supervisor.start()
        await _until_ready(router, layout, config.cluster.start_timeout_s)
        stack.push_async_callback(_drain, router, supervisor, config.cluster.drain_timeout_s)
        yield ServingCluster(config, layout, router, supervisor)


def _restore_sigterm() -> None:
    """Ray puts a handler under Python's that aborts the process 3 s after SIGTERM, amid a drain. Put Python's back."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.siginterrupt(signal.SIGTERM, False)


def _with_worker_host(config: BatonConfig) -> BatonConfig:
    """Workers of a cluster of our own need to be reached from this machine only."""
    if config.cluster.ray_address is not None or config.cluster.worker_host is not None:
        return config
    cluster = config.cluster.model_copy(update={"worker_host": socket.gethostbyname("localhost")})
    return config.model_copy(update={"cluster": cluster})


def _members(addresses: list[WorkerAddress]) -> list[Member]:
    return [Member(address=worker.address, role=worker.role) for worker in addresses]


async def _until_ready(router: Router, layout: ClusterLayout, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(router.registry.wait_for(layout.num_prefill, layout.num_decode), timeout_s)
    except TimeoutError:
        raise BatonError(f"the workers did not attach to the router within {timeout_s:.0f} s") from None


async def _drain(router: Router, supervisor: Supervisor, timeout_s: float) -> None:
    await router.drain(timeout_s)
    await supervisor.drain()
