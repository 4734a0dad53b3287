"""Rows of the failure table: a router that is killed, and one that is full. Workers run in this process, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from baton.chaos.load import Client, Stream
from baton.common.config import BatonConfig, RouterConfig, ServerConfig
from router.registry import Member
from router.server import Router
from tests.chaos.harness import job, until
from tests.support.at_rest import wait_at_rest
from tests.support.oracle import GreedyOracle
from tests.support.worker_client import WorkerClient
from tests.transfer.handover_cluster import config, worker

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
START_S = 60.0


@contextlib.asynccontextmanager
async def router_process(model: Path, *members: Member) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A router of its own process, and its URL."""
    arguments = [f"{member.role}={member.address}" for member in members]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos.router_process", str(model), *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        yield process, line.decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_workers_outlive_a_killed_router_and_free_everything(model: Path, oracle: GreedyOracle) -> None:
    async with (
        worker(config(model), "prefill") as prefill,
        worker(config(model), "decode") as decode,
        WorkerClient(prefill.address, "observer") as at_prefill,
        WorkerClient(decode.address, "observer") as at_decode,
        router_process(model, Member(prefill.address, "prefill"), Member(decode.address, "decode")) as (process, url),
    ):
        client = Client(url, model.name, 60.0)
        streams = [Stream(job(150 + n, 100, seed=n), time.monotonic()) for n in range(6)]
        tasks = [asyncio.create_task(client.fill(stream)) for stream in streams]
        await until(lambda: sum(bool(stream.token_ids) for stream in streams) >= 2, "tokens of two streams")
        process.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        await asyncio.wait_for(asyncio.gather(*tasks), 30.0)
        assert all(stream.error for stream in streams), "every client hears of it"
        heard_s = max(stream.ended_at for stream in streams) - killed_at
        await asyncio.gather(at_prefill.at_rest(), at_decode.at_rest())
        free_s = time.monotonic() - killed_at
        print(f"clients heard after {heard_s:.2f} s, both workers free after {free_s:.2f} s")
        assert heard_s < 10.0
        assert free_s < 20.0
        await client.close()

        members = (Member(prefill.address, "prefill"), Member(decode.address, "decode"))
        async with router_process(model, *members) as (_, url):
            client = Client(url, model.name, 60.0)
            again = await client.run(streams[0].job)
            await client.close()
            assert not again.error
            oracle.check(list(again.job.prompt), again.token_ids)


@contextlib.asynccontextmanager
async def full_router(model: Path, **limits: int) -> AsyncIterator[str]:
    """A router with one decode worker, in this process; its URL."""
    settings = RouterConfig(heartbeat_interval_s=0.05, heartbeat_timeout_s=2.0, **limits)
    served = BatonConfig(model=str(model), server=ServerConfig(port=0, grpc_port=0), router=settings)
    async with worker(config(model), "decode") as decode:
        router = Router(served)
        await router.start()
        try:
            router.registry.set_members([Member(decode.address, "decode")])
            await router.registry.wait_for(0, 1)
            yield f"http://127.0.0.1:{router.http_port}"
        finally:
            await router.stop()


async def test_a_full_router_refuses_at_once_and_says_when_to_come_again(model: Path) -> None:
    async with full_router(model, max_concurrent=2, max_queued=1) as url, httpx.AsyncClient(base_url=url) as http:
        client = Client(url, model.name, 60.0)
        streams = [Stream(job(20, 300, seed=n), time.monotonic()) for n in range(3)]
        tasks = [asyncio.create_task(client.fill(stream)) for stream in streams]
        await until(lambda: sum(bool(stream.token_ids) for stream in streams) == 2, "two running streams")
        start = time.monotonic()
        body = {"model": model.name, "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
        refused = await http.post("/v1/completions", json=body)
        seconds = time.monotonic() - start
        print(f"{refused.status_code} after {seconds:.3f} s, retry-after {refused.headers['retry-after']}")
        assert refused.status_code == 429
        assert float(refused.headers["retry-after"]) >= 1
        assert seconds < 10.0
        await asyncio.gather(*tasks)
        assert not any(stream.error for stream in streams), "the queued one is served in its turn"
        assert (await http.post("/v1/completions", json=body)).status_code == 200
        await client.close()


async def test_a_full_pool_makes_requests_wait(model: Path, oracle: GreedyOracle) -> None:
    """64 blocks of 16 tokens, 12 requests of 20 blocks each."""
    async with full_router(model) as url:
        client = Client(url, model.name, 60.0)
        streams = await asyncio.gather(*(client.run(job(240, 70, seed=n)) for n in range(12)))
        await client.close()
        assert not any(stream.error for stream in streams)
        for stream in streams:
            oracle.check(list(stream.job.prompt), stream.token_ids)
        await wait_at_rest(url, num_workers=1, timeout_s=20.0)
