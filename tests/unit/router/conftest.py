"""A router on real ports with fake workers, and a byte-level tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc.aio
import httpx
import pytest
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from baton.common.clock import Clock
from baton.common.config import BatonConfig
from protos.inference_pb2_grpc import InferenceStub
from router.registry import Member
from router.server import Router
from router.tokenizer import SpecialTokens, Tokenizer
from tests.support.fake_worker import WAIT_S, FakeWorker
from tests.support.http import SHORT_LIVED

if TYPE_CHECKING:
    from protos.inference_pb2_grpc import InferenceAsyncStub

EOS_ID = 256
MODEL = "fake"


def byte_tokenizer() -> Tokenizer:
    """One token per byte, ids sorted by the byte-level alphabet; 256 is EOS, the vocabulary has 300 ids."""
    alphabet = sorted(ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([tokenizers.AddedToken("<eos>", special=True)])
    return Tokenizer(backend, SpecialTokens(None, frozenset({EOS_ID}), None), 300)


@dataclass(slots=True)
class Served:
    """A started router and its clients."""

    router: Router
    http: httpx.AsyncClient
    grpc: InferenceAsyncStub
    tokenizer: Tokenizer

    async def attach(self, *workers: FakeWorker) -> None:
        """Start the workers, make them the only members, and wait until all are attached and no pair is connecting."""
        for worker in workers:
            if not worker.address:
                await worker.start()
        roles = [worker.hello.role for worker in workers]
        self.router.registry.set_members(Member(worker.address, worker.hello.role) for worker in workers)
        async with asyncio.timeout(WAIT_S):
            await self.router.registry.wait_for(roles.count("prefill"), roles.count("decode"))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition of the router; it is looked at every millisecond."""
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": MODEL, "prompt": [1, 2, 3], **fields})

    async def record(self, request_id: str) -> dict[str, Any]:
        response = await self.http.get(f"/v1/requests/{request_id}")
        assert response.status_code == 200
        content = response.json()
        assert isinstance(content, dict)
        return content


@contextlib.asynccontextmanager
async def serving(clock: Clock | None = None, **overrides: Any) -> AsyncIterator[Served]:
    """A router whose config sections are overridden by keyword, for instance `router={"policy": "remote"}`.

    `chat_templates`: instead of none at all.
    """
    chat_templates = overrides.pop("chat_templates", None)
    server = {"port": 0, "grpc_port": 0} | overrides.pop("server", {})
    router_section = {"heartbeat_interval_s": 0.05, "heartbeat_timeout_s": 1.0} | overrides.pop("router", {})
    config = BatonConfig.model_validate({"model": MODEL, "server": server, "router": router_section, **overrides})
    tokenizer = byte_tokenizer()
    router = Router(config, tokenizer, clock, chat_templates)
    await router.start()
    try:
        url = f"http://127.0.0.1:{router.http_port}"
        async with (
            httpx.AsyncClient(base_url=url, timeout=WAIT_S, limits=SHORT_LIVED) as http,
            grpc.aio.insecure_channel(f"127.0.0.1:{router.grpc_port}") as channel,
        ):
            yield Served(router, http, InferenceStub(channel), tokenizer)
    finally:
        await router.stop()


@pytest.fixture
async def workers() -> AsyncIterator[list[FakeWorker]]:
    """Append what you start; all are killed at the end."""
    started: list[FakeWorker] = []
    yield started
    for worker in started:
        await worker.kill()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as started:
        yield started
