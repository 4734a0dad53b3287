"""The client against a real socket: what it sends, what it survives, how it loads."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton.common.clock import MonotonicClock
from baton.common.errors import ConfigError
from benchmarks.serve.client import ApiSettings, CompletionClient, render_body
from benchmarks.serve.connection import ConnectionPool, parse_server
from benchmarks.serve.load import Job, measured_run
from benchmarks.serve.records import Counting, RequestRecord
from benchmarks.serve.tokens import Domain, TokenSource
from tests.unit.benchmarks.scripted_server import Exchange, Script, ScriptedServer, running, well_behaved

PROMPT = TokenSource(0, 10, 90).draw(Domain.PROMPT, 0, 6)


def jobs(api: ApiSettings, count: int, max_tokens: int = 3) -> list[Job]:
    return [Job(RequestRecord(i, 6, max_tokens), render_body(api, PROMPT, max_tokens)) for i in range(count)]


@asynccontextmanager
async def client_of(
    script: Script, api_key: str | None = None, **api: Any
) -> AsyncIterator[tuple[CompletionClient, ScriptedServer, ApiSettings, ConnectionPool]]:
    async with running(script) as server:
        settings = ApiSettings("m", **api)
        where, clock = parse_server(server.url + "/v1"), MonotonicClock()
        pool = ConnectionPool(where, clock)
        try:
            yield CompletionClient(where, pool, settings, clock, api_key), server, settings, pool
        finally:
            pool.close()


async def one(script: Script, **api: Any) -> RequestRecord:
    async with client_of(script, **api) as (client, _, settings, _):
        job = jobs(settings, 1)[0]
        await client.complete(job.record, job.body)
        return job.record


async def test_a_request_asks_for_what_is_measured() -> None:
    async with client_of(well_behaved, counting=Counting.USAGE, temperature=0.5, extra={"seed": 4}) as (
        c,
        server,
        api,
        _,
    ):
        await c.complete(RequestRecord(0, 6, 3), render_body(api, PROMPT, 3))
    assert server.bodies == [
        {
            "model": "m",
            "prompt": PROMPT.tolist(),
            "max_tokens": 3,
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "ignore_eos": True,
            "seed": 4,
        }
    ]


async def test_times_are_in_order_and_tokens_counted() -> None:
    record = await one(well_behaved)
    assert record.failure is None
    assert record.output_tokens == sum(record.chunk_tokens) == 3
    moments = [record.started, *record.chunk_times, record.ended]
    assert moments == sorted(moments)
    assert (record.prompt_tokens, record.finish_reason, record.status) == (6, "length", 200)


async def test_a_token_is_stamped_when_it_comes_not_when_the_stream_ends() -> None:
    seen = asyncio.Event()

    async def wait_between(exchange: Exchange) -> None:
        exchange.head()
        exchange.token()
        await seen.wait()
        exchange.token(finish="length")
        exchange.end()

    class Announcing(list[float]):
        def append(self, time: float) -> None:
            super().append(time)
            stamped.set()

    stamped = asyncio.Event()
    async with client_of(wait_between) as (client, _, api, _), asyncio.timeout(20):
        job = jobs(api, 1)[0]
        job.record.chunk_times = Announcing()
        task = asyncio.create_task(client.complete(job.record, job.body))
        await stamped.wait()
        between = MonotonicClock().now()
        seen.set()
        await task
    first, second = job.record.chunk_times
    assert first <= between <= second


async def error_body(exchange: Exchange) -> None:
    text = b'{"error": {"message": "queue is full"}}'
    exchange.head("429 Too Many Requests", f"Content-Length: {len(text)}\r\n")
    exchange.writer.write(text)


async def cut_after_a_token(exchange: Exchange) -> None:
    exchange.head()
    exchange.token()
    await exchange.writer.drain()
    exchange.writer.close()


async def cut_at_once(exchange: Exchange) -> None:
    exchange.writer.close()


async def no_json(exchange: Exchange) -> None:
    exchange.head()
    exchange.event("{oops")


async def no_events(exchange: Exchange) -> None:
    exchange.head()
    exchange.chunk(b"<html>sorry</html>\n")


async def no_http(exchange: Exchange) -> None:
    exchange.writer.write(b"hello there\r\n\r\n")


async def error_event(exchange: Exchange) -> None:
    exchange.head()
    exchange.token()
    exchange.event({"error": {"message": "worker lost"}})
    exchange.end()


async def no_done(exchange: Exchange) -> None:
    exchange.head()
    exchange.token(finish="stop")
    exchange.writer.write(b"0\r\n\r\n")


async def nothing(exchange: Exchange) -> None:
    exchange.head()
    exchange.end()


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (error_body, "http_429", "queue is full"),
        (cut_after_a_token, "disconnected", "closed by the server"),
        (cut_at_once, "disconnected", "closed by the server"),
        (no_json, "malformed_sse", "oops"),
        (no_events, "malformed_sse", "html"),
        (no_http, "malformed_http", "hello there"),
        (error_event, "server_error_event", "worker lost"),
        (no_done, "incomplete_stream", "[DONE]"),
        (nothing, "no_tokens", "no token"),
    ],
)
async def test_failures_are_recorded_by_kind_and_the_next_request_works(
    script: Script, kind: str, message: str
) -> None:
    broken = True

    async def first_fails(exchange: Exchange) -> None:
        await (script if broken else well_behaved)(exchange)

    async with client_of(first_fails) as (client, _, api, _):
        bad, good = jobs(api, 2)
        await client.complete(bad.record, bad.body)
        broken = False
        await client.complete(good.record, good.body)
    assert bad.record.failure == kind
    assert message in (bad.record.message or "")
    assert bad.record.ended >= bad.record.started > 0
    assert good.record.failure is None


async def test_a_request_that_never_ends_times_out() -> None:
    async def silent(exchange: Exchange) -> None:
        exchange.head()
        await exchange.writer.drain()
        await exchange.writer.wait_closed()

    record = await one(silent, timeout=0.05)
    assert record.failure == "timeout"
    assert record.status == 200


async def test_a_server_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        where, clock = parse_server(f"http://127.0.0.1:{unused.getsockname()[1]}"), MonotonicClock()
        record = RequestRecord(0, 6, 3)
        client = CompletionClient(where, ConnectionPool(where, clock), ApiSettings("m"), clock, None)
        await client.complete(record, b"{}")
    assert record.failure == "connect_error"


async def test_connections_are_kept_and_a_stale_one_is_replaced_unnoticed() -> None:
    async with client_of(well_behaved) as (client, server, api, pool):
        for job in jobs(api, 3):
            await client.complete(job.record, job.body)
        assert pool.opened == server.connections == 1

    async def close_after_answer(exchange: Exchange) -> None:
        await well_behaved(exchange)
        exchange.writer.close()

    async with client_of(close_after_answer) as (client, server, api, _):
        for job in jobs(api, 3):
            await client.complete(job.record, job.body)
            assert job.record.failure is None
        assert server.connections == 3


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    """Nothing is answered until all have been sent: a loop that waited would never end."""
    all_here = asyncio.Event()

    async def hold(exchange: Exchange) -> None:
        if server.under_way == 5:
            all_here.set()
        await all_here.wait()
        await well_behaved(exchange)

    async with client_of(hold) as (client, server, api, _), asyncio.timeout(20):
        times = [0.0, 0.01, 0.01, 0.02, 0.03]
        run = await measured_run(client, jobs(api, 5), times, None, MonotonicClock())
    assert [record.failure for record in run.records] == [None] * 5
    for record, time in zip(run.records, times, strict=True):
        assert record.scheduled == pytest.approx(run.started + time)
        assert record.started >= (record.scheduled or math.inf)
    assert run.offered_rate == pytest.approx(4 / 0.03)
    assert run.ended == max(record.ended for record in run.records)


async def test_a_closed_loop_keeps_its_concurrency_and_sends_all() -> None:
    async with client_of(well_behaved) as (client, server, api, _):
        run = await measured_run(client, jobs(api, 20), None, 4, MonotonicClock())
    assert server.most_under_way == 4
    assert len(server.bodies) == 20
    assert all(record.ok and record.scheduled is None for record in run.records)
    assert run.offered_rate is None


async def test_path_header_and_api_key_with_a_percent_sign() -> None:
    async def named(exchange: Exchange) -> None:
        exchange.head(headers="X-Baton-Path: remote; auto: 0.1 s local; more\r\nTransfer-Encoding: chunked\r\n")
        exchange.token(text=exchange.headers["authorization"], finish="stop")
        exchange.end()
        keys.append(exchange.headers["authorization"])

    keys: list[str] = []
    async with client_of(named, api_key="100%d") as (client, _, api, _):
        job = jobs(api, 1)[0]
        await client.complete(job.record, job.body)
    assert job.record.path == "remote"
    assert keys == ["Bearer 100%d"]


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"),
        ("https://h/api/v1", "https://h:443/api"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    assert parse_server(url).url == base


@pytest.mark.parametrize("url", ["h:8000", "ftp://h", "http://", "http://h:x"])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        parse_server(url)
