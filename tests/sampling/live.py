"""Real workers and real routers in one process: a prefill and a decode worker, and one router for each path.

All run on the event loop of whoever entered `live`; Ray alone is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import httpx
import pytest

from baton.common.config import BatonConfig
from baton.engine.batch import PrefillSegment
from baton.engine.request import Request
from baton.engine.schedulers.chunked import ChunkedScheduler
from baton.worker.shell import WorkerShell
from protos.inference_pb2_grpc import InferenceStub
from router.registry import Member
from router.server import Router
from tests.support.at_rest import wait_at_rest
from tests.support.http import SHORT_LIVED
from tests.transfer.handover_cluster import config, worker

if TYPE_CHECKING:
    from protos.inference_pb2_grpc import InferenceAsyncStub

WAIT_S = 60.0
PATHS = ("local", "remote")


@dataclass
class Server:
    """One router and its clients."""

    router: Router
    http: httpx.AsyncClient
    grpc: InferenceAsyncStub
    path: str

    async def complete(self, **fields: Any) -> dict[str, Any]:
        """The answer of POST /v1/completions, which must have taken the server's path."""
        response = await self.http.post("/v1/completions", json={"model": "m", **fields})
        assert response.status_code == 200, response.text
        assert response.headers["x-baton-path"].startswith(f"{self.path}; "), response.headers["x-baton-path"]
        content: dict[str, Any] = response.json()
        return content


@dataclass
class Live:
    """`servers` by path; both have the same workers."""

    model: Path
    prefill: WorkerShell
    decode: WorkerShell
    servers: dict[str, Server] = field(default_factory=dict)

    async def at_rest(self) -> None:
        await wait_at_rest(str(self.servers["local"].http.base_url), 2, 10.0)


@contextlib.asynccontextmanager
async def live(model: Path, **sections: object) -> AsyncIterator[Live]:
    """`sections` replace those of the workers' configuration."""
    worker_config = config(model, **sections)
    async with contextlib.AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(worker(worker_config, "prefill"))
        decode = await stack.enter_async_context(worker(worker_config, "decode"))
        cluster = Live(model, prefill, decode)
        for path in PATHS:
            cluster.servers[path] = await stack.enter_async_context(_server(worker_config, path))
            router = cluster.servers[path].router
            router.registry.set_members([Member(prefill.address, "prefill"), Member(decode.address, "decode")])
        async with asyncio.timeout(WAIT_S):
            for server in cluster.servers.values():
                await server.router.registry.wait_for(1, 1)
        yield cluster


@contextlib.asynccontextmanager
async def _server(worker_config: BatonConfig, path: str) -> AsyncIterator[Server]:
    router_config = worker_config.router.model_copy(update={"policy": path})
    server_config = worker_config.server.model_copy(update={"port": 0, "grpc_port": 0})
    update = {"router": router_config, "server": server_config, "served_model_name": "m"}
    router = Router(worker_config.model_copy(update=update))
    await router.start()
    try:
        async with (
            httpx.AsyncClient(base_url=_url(router), timeout=WAIT_S, limits=SHORT_LIVED) as http,
            grpc.aio.insecure_channel(f"127.0.0.1:{router.grpc_port}") as channel,
        ):
            yield Server(router, http, InferenceStub(channel), path)
    finally:
        await router.stop()


def _url(router: Router) -> str:
    return f"http://127.0.0.1:{router.http_port}"


@dataclass
class Prefills:
    """Which prompt tokens were computed, by engine request; and how many were found in the prefix cache."""

    computed: dict[str, int] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)

    def add(self, segment: PrefillSegment) -> None:
        name = segment.request.request_id
        self.computed[name] = self.computed.get(name, 0) + segment.num_tokens
        self.requests[name] = segment.request

    @property
    def total(self) -> int:
        return sum(self.computed.values())


@contextlib.contextmanager
def counted_prefills() -> Iterator[Prefills]:
    """Counts on every engine of this process."""
    prefills = Prefills()
    original = ChunkedScheduler._next_chunk

    def next_chunk(scheduler: ChunkedScheduler, request: Request, budget: int) -> PrefillSegment:
        segment = original(scheduler, request, budget)
        prefills.add(segment)
        return segment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkedScheduler, "_next_chunk", next_chunk)
        yield prefills
