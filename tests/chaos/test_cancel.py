"""Rows of the failure table: a cancel in every state frees both workers, and a second one changes nothing.

The workers run in this process and the test is their router, so that it can cancel twice and in any state.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.transfer.handover_cluster import Cluster, Key, Unpacks, cluster, config, prompt, spec

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]
FREE_S = 10.0  # promised is one second; cores are shared


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(model: Path) -> AsyncIterator[Cluster]:
    async with cluster(config(model)) as both:
        await both.connect()
        yield both


State = Callable[[Cluster, str, Unpacks], Awaitable[Key]]


async def reserved(workers: Cluster, name: str, unpacks: Unpacks) -> Key:
    await workers.open(name, spec(prompt(200)))
    return name, 1


async def prefilling(workers: Cluster, name: str, unpacks: Unpacks) -> Key:
    return await workers.begin(name, spec(prompt(400)))


async def transferring(workers: Cluster, name: str, unpacks: Unpacks) -> Key:
    unpacks.hold_from(1)
    key = await workers.begin(name, spec(prompt(200)))
    await unpacks.held.wait()
    return key


async def decoding(workers: Cluster, name: str, unpacks: Unpacks) -> Key:
    key = await workers.begin(name, spec(prompt(40), 400))
    await workers.to_decode.until(lambda: len(workers.to_decode.tokens[key]) >= 3, "some tokens")
    return key


async def finished(workers: Cluster, name: str, unpacks: Unpacks) -> Key:
    await workers.remote(name, spec(prompt(40)))
    return name, 1


def num_ends(workers: Cluster, key: Key) -> list[int]:
    """Terminal frames about an attempt, of either worker."""
    return [
        sum(
            (frame.failed.key.request_id, frame.failed.key.attempt) == key
            or (frame.refused.key.request_id, frame.refused.key.attempt) == key
            for frame in client.frames
        )
        + (key in client.finish_reasons)
        for client in (workers.to_prefill, workers.to_decode)
    ]


@pytest.mark.parametrize("state", [reserved, prefilling, transferring, decoding, finished], ids=lambda s: s.__name__)
async def test_a_cancel_frees_both_workers_and_a_second_changes_nothing(workers: Cluster, state: State) -> None:
    unpacks = Unpacks(workers.decode)
    name = state.__name__
    key: Key = await state(workers, name, unpacks)
    start = time.monotonic()
    for _ in range(2):
        await workers.to_prefill.cancel(name)
        await workers.to_decode.cancel(name)
    unpacks.release()
    await workers.at_rest()
    seconds = time.monotonic() - start
    print(f"{name}: free after {seconds:.2f} s")
    assert seconds < FREE_S
    before = num_ends(workers, key)
    await workers.to_decode.cancel(name)
    await workers.to_prefill.cancel(name)
    remote = await workers.remote(f"after {name}", spec(prompt(40)))
    assert remote == await workers.local(f"local after {name}", spec(prompt(40)))
    assert num_ends(workers, key) == before
    await workers.at_rest()
