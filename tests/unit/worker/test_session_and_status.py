"""What a session remembers, and when a worker calls itself healthy."""

from __future__ import annotations

import pytest

from baton.engine.ports import BlockCounts, EngineStats
from baton.worker import session as session_module
from baton.worker.session import RouterSession, engine_id
from baton.worker.status import MAX_FAILED_STEPS, STALLED_AFTER_S, health, heartbeat
from baton.worker.step_timing import StepTime
from protos import worker_pb2 as pb

BLOCKS = BlockCounts(free=1, cached=2, running=3, leased=4, quarantined=5, total=15)


def stats(blocks: BlockCounts = BLOCKS, progress_age: float = 0.0, failed: int = 0) -> EngineStats:
    return EngineStats(blocks, 6, 7, 8, 9, progress_age, failed)


def test_ids_of_sessions_never_collide() -> None:
    names = ["a", "a/1", "1/a", ""]
    keys = [
        RouterSession(number, "same").key(pb.AttemptKey(request_id=name, attempt=attempt))
        for number in (1, 11)
        for name in names
        for attempt in (1, 2, 11)
    ]
    assert len({engine_id(key) for key in keys}) == len(keys)


def test_only_the_latest_ended_attempts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_REMEMBERED_ATTEMPTS", 2)
    session = RouterSession(1, "router")
    keys = [session.key(pb.AttemptKey(request_id=str(number), attempt=1)) for number in range(3)]
    for key in keys:
        session.remember_ended(key)
    assert [session.has_ended(key) for key in keys] == [False, True, True]


def test_the_heartbeat_says_what_there_is() -> None:
    class Half:
        def staging_in_use(self) -> int:
            return 2

        def transfer_totals(self) -> None:
            return None

    beat = heartbeat(3, stats(), StepTime(0.1, 0.2, 0.3, 4), [Half(), Half()])  # type: ignore[list-item]
    blocks = beat.blocks
    assert (blocks.free, blocks.cached, blocks.running, blocks.leased, blocks.quarantined) == (1, 2, 3, 4, 5)
    assert (blocks.total, blocks.staging_in_use) == (15, 4)
    assert (beat.num_waiting, beat.num_running, beat.queued_prefill_tokens, beat.steps) == (6, 7, 8, 9)
    assert (beat.timing.per_prefill_token_s, beat.timing.samples) == (0.2, 4)


def test_blocks_that_do_not_add_up_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    lost = BlockCounts(1, 2, 3, 4, 5, 16)
    heartbeat(0, stats(lost), StepTime(0, 0, 0, 0), [])
    assert "blocks are lost" in caplog.text
    assert not health(stats(lost), 0)[0]


@pytest.mark.parametrize(
    ("state", "num_faults", "healthy", "reason"),
    [
        (stats(), 0, True, "idle"),
        (stats(progress_age=STALLED_AFTER_S / 2), 0, True, "working"),
        (stats(progress_age=STALLED_AFTER_S * 2), 0, False, "no step"),
        (stats(failed=MAX_FAILED_STEPS), 0, False, "steps failed"),
        (stats(), 1, False, "defects"),
    ],
)
def test_health_means_progress_or_rest(state: EngineStats, num_faults: int, healthy: bool, reason: str) -> None:
    verdict, said = health(state, num_faults)
    assert verdict is healthy
    assert reason in said
