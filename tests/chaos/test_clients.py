"""Rows of the failure table: clients that disconnect in any state, and requests that nobody should serve."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.chaos.harness import Harness, Running, job, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="session")]
FREE_S = 10.0  # promised is one second; cores are shared


async def hang_up(*running: Running) -> None:
    for one in running:
        one.task.cancel()
    await asyncio.gather(*(one.task for one in running), return_exceptions=True)


async def test_a_client_that_disconnects_amid_its_stream(harness: Harness) -> None:
    running = harness.start(job(100, 400))
    await running.tokens(5)
    await hang_up(running)
    seconds = await harness.at_rest(FREE_S)
    print(f"streaming: free after {seconds:.2f} s")


async def test_a_client_that_disconnects_amid_the_transfer(harness: Harness) -> None:
    """Blocks are free at once, staging when the chunks in flight have passed: a sixth of a second each here."""
    async with harness.injected(bytes_per_s=200_000):
        running = harness.start(job(400, 100, seed=9))
        await running.tokens(1)
        await hang_up(running)
        seconds = await harness.at_rest(FREE_S)
    print(f"in transfer: free after {seconds:.2f} s")
    assert len(running.stream.token_ids) == 1, "the transfer was over before the client left"


async def test_clients_that_disconnect_before_their_first_token(harness: Harness) -> None:
    """A hundred at once: queued, reserving, prefilling."""
    running = harness.start_many(100, 300, 100)
    await until(lambda: any(one.stream.token_ids for one in running), "the first token of any")
    without = sum(not one.stream.token_ids for one in running)
    await hang_up(*running)
    seconds = await harness.at_rest(FREE_S)
    print(f"{without} of 100 had no token yet: free after {seconds:.2f} s")
    assert without > 50
    await harness.check(*harness.start_many(4, 100, 20))


BAD_REQUESTS: list[tuple[str, dict[str, object] | bytes, int, str | None]] = [
    ("prompt too long", {"prompt": [1] * 600}, 400, "prompt"),
    ("max_tokens too large", {"prompt": [1], "max_tokens": 100_000}, 400, "max_tokens"),
    ("bad parameter", {"prompt": [1], "temperature": -1}, 400, "temperature"),
    ("unknown model", {"prompt": [1], "model": "another"}, 404, "model"),
    ("broken JSON", b'{"prompt": [1', 400, None),
    ("no object", b"[]", 400, None),
]


async def test_bad_requests_are_answered_at_once(harness: Harness) -> None:
    for name, body, status, param in BAD_REQUESTS:
        start = time.monotonic()
        if isinstance(body, bytes):
            response = await harness.http.post("/v1/completions", content=body)
        else:
            response = await harness.http.post("/v1/completions", json={"model": "tiny", "max_tokens": 4, **body})
        seconds = time.monotonic() - start
        print(f"{name}: {response.status_code} after {seconds:.3f} s: {response.json()['error']['message']}")
        assert (response.status_code, response.json()["error"]["param"]) == (status, param), name
        assert seconds < 10.0, name
        metrics = (await harness.http.get("/metrics")).text
        assert "baton_requests_running 0.0" in metrics, name
        assert "baton_requests_queued 0.0" in metrics, name
