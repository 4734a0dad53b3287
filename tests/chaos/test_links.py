"""Rows of the failure table: corrupt blocks, and control messages that are lost, doubled or late, between workers and
between router and worker.
"""

from __future__ import annotations

import time

import pytest

from tests.chaos.conftest import LEASE_S
from tests.chaos.harness import Harness, job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="session")]


@pytest.mark.parametrize("fault", ["corruption", "stale", "truncation"])
async def test_a_spoilt_block_is_computed_again(harness: Harness, fault: str) -> None:
    async with harness.injected(**{fault: 1.0}):
        running = harness.start(job(300, 40, seed=4 + len(fault)))
        await harness.check(running)
    outcomes = await harness.attempts(running)
    stall_s = running.stream.arrivals[1] - running.stream.arrivals[0]
    print(f"{fault}: attempts {outcomes}, second token {stall_s:.2f} s after the first")
    assert outcomes[0].startswith("failed (corrupt)")
    assert outcomes[-1] == "finished"
    assert stall_s < 3.0


async def test_a_few_spoilt_blocks_under_load(harness: Harness) -> None:
    async with harness.injected(corruption=0.05, stale=0.05, truncation=0.05):
        await harness.check(*harness.start_many(24, 150, 30, seed=5))


@pytest.mark.parametrize(
    "settings",
    [{"frame_delay_s": 0.02, "frame_jitter_s": 0.2}, {"frame_duplication": 0.5}, {"frame_loss": 0.05}],
    ids=["late", "doubled", "lost"],
)
async def test_messages(harness: Harness, settings: dict[str, float]) -> None:
    """Nothing worse than a stall until the lease ends: never a wrong token, and nothing stays leased."""
    start = time.monotonic()
    async with harness.injected(**settings):
        streams = harness.start_many(24, 150, 30, seed=6)
        await harness.check(*streams)
    gaps = [b - a for one in streams for a, b in zip(one.stream.arrivals, one.stream.arrivals[1:], strict=False)]
    print(f"{settings}: {time.monotonic() - start:.1f} s in all, longest stall {max(gaps):.2f} s")
    assert max(gaps) < 2 * LEASE_S
    await harness.complete()
    print(f"at rest {await harness.at_rest(LEASE_S + 3.0):.1f} s later")


@pytest.mark.parametrize(
    "settings", [{"router_delay_s": 0.05, "router_jitter_s": 0.3}, {"router_break": 0.1}], ids=["late", "broken"]
)
async def test_messages_of_the_router(harness: Harness, settings: dict[str, float]) -> None:
    """Late ones only delay. A stream that breaks withdraws what its router asked for: each time it begins elsewhere."""
    start = time.monotonic()
    before, _, _ = await harness.cluster.counts()
    async with harness.injected(**settings):
        streams = harness.start_many(24, 150, 30, seed=8)
        await harness.check(*streams)
    after, _, _ = await harness.cluster.counts()
    lost = after.get("worker_lost", 0) - before.get("worker_lost", 0)
    gaps = [b - a for one in streams for a, b in zip(one.stream.arrivals, one.stream.arrivals[1:], strict=False)]
    print(f"{settings}: {time.monotonic() - start:.1f} s in all, longest stall {max(gaps):.2f} s, {lost} attempts lost")
    assert (lost > 0) == ("router_break" in settings)
    assert max(gaps) < 2 * LEASE_S
    await harness.complete()
    await harness.at_rest(LEASE_S + 3.0)


async def test_a_slow_link_is_only_slow(harness: Harness) -> None:
    async with harness.injected(bytes_per_s=500_000):
        streams = harness.start_many(6, 200, 20, seed=7)
        await harness.check(*streams)
    assert {(await harness.record(one))["path"] for one in streams} == {"remote"}
