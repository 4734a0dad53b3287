"""Rows of the failure table: a prefill or decode worker is killed, or stands still and comes back."""

from __future__ import annotations

import itertools
import os
import signal
import time

import pytest

from tests.chaos.harness import Harness, Running, job, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200), pytest.mark.asyncio(loop_scope="session")]
DETECTION_S = 15.0  # promised are two seconds, of a machine that has time for them; the measured ones are printed
STALL_S = (
    20.0  # promised are detection within 2 s and one prefill, of a machine that has time for them; see what is printed
)


async def test_prefill_killed_before_its_transfer(harness: Harness) -> None:
    """No request has sent anything: all begin again elsewhere."""
    blocker = harness.start_many(12, 400, 24)
    await until(lambda: any(one.stream.token_ids for one in blocker), "the first token of any")
    seen = next(one for one in blocker if one.stream.token_ids)
    worker, pid = await harness.worker_of(seen, "prefill")
    waiting = [one for one in blocker if not one.stream.token_ids]
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await harness.check(*blocker)
    first_s = max(one.stream.arrivals[0] - killed_at for one in waiting)
    whole_s = await harness.complete(worker)
    print(f"{len(waiting)} waited at most {first_s:.2f} s for their first token; whole again {whole_s:.1f} s later")
    assert first_s < STALL_S


async def test_prefill_killed_amid_a_transfer(harness: Harness) -> None:
    """The first token is out and the KV still on its way."""
    async with harness.injected(bytes_per_s=50_000):
        running = harness.start(job(400, 40, seed=1))
        await running.tokens(1)
        worker, pid = await harness.worker_of(running, "prefill")
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await harness.check(running)
    stall_s = running.stall_after(killed_at)
    outcomes = await harness.attempts(running)
    print(f"stall {stall_s:.2f} s, attempts {outcomes}; whole again {await harness.complete(worker):.1f} s later")
    assert len(outcomes) >= 2
    assert outcomes[0].startswith("failed")
    assert stall_s < STALL_S


async def test_decode_killed_amid_its_streams(harness: Harness) -> None:
    streams = harness.start_many(8, 60, 300)
    for one in streams:
        await one.tokens(3)
    worker, pid = await harness.worker_of(streams[0], "decode")
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await harness.check(*streams)
    moved = [one for one in streams if len(await harness.attempts(one)) > 1]
    stall_s = max(one.stall_after(killed_at) for one in moved)
    whole_s = await harness.complete(worker)
    print(f"{len(moved)} streams went on after at most {stall_s:.2f} s; whole again {whole_s:.1f} s later")
    assert stall_s < STALL_S


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_that_stands_still_and_comes_back_says_nothing_wrong(harness: Harness, role: str) -> None:
    """SIGSTOP for 3 s is longer than the heartbeat's timeout: given up, fenced, attached again (I8)."""
    streams = harness.start_many(8, 200, 150, seed=2)
    await streams[0].tokens(3)
    stopped, pid = await harness.worker_of(streams[0], role)
    stopped_at = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        later = harness.start_many(4, 100, 40, seed=3)
        detected_s = await harness.given_up(stopped) - stopped_at
        await until(lambda: time.monotonic() > stopped_at + 3.0, "three seconds")
    finally:
        os.kill(pid, signal.SIGCONT)
    await harness.check(*streams, *later)
    stalls = [longest_gap(one, stopped_at) for one in (*streams, *later)]
    print(
        f"{role} stopped for 3 s: given up after {detected_s:.2f} s, longest stall {max(stalls):.2f} s, "
        f"whole again {await harness.complete():.1f} s later"
    )
    assert detected_s < DETECTION_S
    assert max(stalls) < STALL_S


def longest_gap(running: Running, since: float) -> float:
    """The longest wait for a token from `since` on."""
    times = [max(running.stream.started_at, since), *(at for at in running.stream.arrivals if at > since)]
    return max((after - before for before, after in itertools.pairwise(times)), default=0.0)
