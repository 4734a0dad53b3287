"""The prefill end of the hand-over, one rule per test."""

from __future__ import annotations

from itertools import permutations

import pytest

from kv_transfer.events import (
    AbortPrefill,
    AttemptKey,
    Cancel,
    DestroyEpoch,
    EpochDestroyed,
    Pack,
    PeerConnected,
    PeerLost,
    PrefillDone,
    PrefillFailed,
    PrefillRequested,
    ReleasePrefill,
    ReportFailed,
    SegmentReady,
    SendDone,
    StartPrefill,
    StartSend,
    Tick,
)
from kv_transfer.messages import Abort, Chunk, ChunksDone, Commit, Committed, Finish, LeaseKey
from kv_transfer.protocol import STALL_TIMEOUT_S, counters, next_deadline
from tests.transfer.protocol_harness import (
    DEADLINE,
    EPOCH,
    LEASE_A,
    LEASE_B,
    PEER,
    A,
    B,
    PrefillEnd,
    of_type,
    segment,
)


def failed(end: PrefillEnd) -> list[str]:
    return [report.code for report in of_type(ReportFailed, tuple(end.history))]


def test_a_prefill_without_a_connection_is_refused_and_forgotten() -> None:
    end = PrefillEnd(connect=False)
    end.begin()
    assert failed(end) == ["no_connection"]
    assert not of_type(StartPrefill, end.actions)
    assert counters(end.state).live == 0


def test_a_prefill_past_its_deadline_is_refused_and_the_peer_is_told() -> None:
    end = PrefillEnd()
    end.feed(Tick(DEADLINE))
    end.begin()
    assert failed(end) == ["expired"]
    assert end.said() == [Abort(LEASE_A, "expired")]


def test_a_repeated_command_is_answered_once() -> None:
    end = PrefillEnd()
    end.begin()
    end.begin()
    assert end.actions == ()
    end.feed(Cancel(A))
    end.begin()
    assert end.actions == ()


def test_whole_hand_over_releases_only_when_committed() -> None:
    end = PrefillEnd()
    end.begin()
    assert end.actions == (StartPrefill(A),)
    assert end.ready(0) == (Pack(PEER, EPOCH, 0, 0, A, LEASE_A, segment(0)),)
    assert end.done() == ()
    end.packed(0)
    assert end.said() == [Chunk(0, LEASE_A, segment(0), 64, (0,)), Commit(LEASE_A, 32, 1, 5)]
    assert of_type(StartSend, end.actions) == [StartSend(PEER, EPOCH, 0, 0, 64)]
    end.sent(0)
    end.hears(ChunksDone(1))
    assert not of_type(ReleasePrefill, tuple(end.history))
    assert end.hears(Committed(LEASE_A)) == (ReleasePrefill(A),)
    assert counters(end.state) == (0, 0, 0)
    assert next_deadline(end.state) is None


def test_a_fully_cached_prompt_commits_zero_chunks() -> None:
    end = PrefillEnd()
    end.begin()
    end.done()
    assert end.said() == [Commit(LEASE_A, 32, 0, 5)]


def test_window_and_slots_bound_what_is_packed() -> None:
    end = PrefillEnd(window=2)
    end.begin()
    packs = [pack for block in range(4) for pack in of_type(Pack, end.ready(block))]
    assert [(pack.seq, pack.slot) for pack in packs] == [(0, 0), (1, 1)]
    end.packed(0)
    assert end.sent(0) == ()  # a slot is free, but no credit
    assert of_type(Pack, end.hears(ChunksDone(1))) == [Pack(PEER, EPOCH, 2, 0, A, LEASE_A, segment(2))]
    end.packed(1)
    assert end.hears(ChunksDone(2)) == ()  # a credit, but slot 1 is still being read
    assert of_type(Pack, end.sent(1)) == [Pack(PEER, EPOCH, 3, 1, A, LEASE_A, segment(3))]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_chunks_leave_in_order_of_seq_whatever_the_order_of_packing(order: tuple[int, ...]) -> None:
    end = PrefillEnd(window=3)
    end.begin()
    for block in range(3):
        end.ready(block)
    for seq in order:
        end.packed(seq)
    assert [send.seq for send in of_type(StartSend, tuple(end.history))] == [0, 1, 2]


def test_repeated_and_early_events_change_nothing() -> None:
    end = PrefillEnd()
    end.begin()
    end.ready(0)
    assert end.sent(0) == ()
    end.packed(0)
    assert end.packed(0) == ()
    end.sent(0)
    assert end.sent(0) == ()
    end.hears(ChunksDone(1))
    before = end.state
    end.hears(ChunksDone(1))
    end.hears(ChunksDone(0))
    assert end.state == before


def test_acknowledging_what_was_never_sent_tears_the_epoch_down() -> None:
    end = PrefillEnd()
    end.begin()
    end.ready(0)
    end.hears(ChunksDone(1))
    assert of_type(DestroyEpoch, end.actions)


def test_nearest_to_commit_goes_first() -> None:
    end = PrefillEnd(window=1)
    end.begin(A, LEASE_A)
    end.begin(B, LEASE_B)
    for block in range(3):
        end.ready(block, A)
    end.ready(0, B)
    end.done(B)
    end.packed(0)
    end.sent(0)
    assert [pack.key for pack in of_type(Pack, end.hears(ChunksDone(1)))] == [B]


def packed_next(end: PrefillEnd, seq: int) -> list[AttemptKey]:
    """Whose chunk is packed when chunk `seq`, the only one that the window allows, is through."""
    end.packed(seq)
    end.sent(seq)
    return [pack.key for pack in of_type(Pack, end.hears(ChunksDone(seq + 1)))]


def test_who_waits_first_goes_first_until_its_queue_is_empty() -> None:
    end = PrefillEnd(window=1)
    end.begin(A, LEASE_A)
    end.begin(B, LEASE_B)
    for block, key in ((0, A), (1, A), (0, B), (2, A)):
        end.ready(block, key)
    assert [packed_next(end, seq) for seq in range(3)] == [[A], [A], [B]]
    end.ready(1, B)
    end.ready(3, A)
    assert [packed_next(end, seq) for seq in range(3, 6)] == [[B], [A], []]


def test_of_those_that_are_complete_the_one_with_fewest_left_goes_first() -> None:
    end = PrefillEnd(window=1)
    third, lease = AttemptKey("c", 0), LeaseKey(3, 9)
    for key, name in ((third, lease), (A, LEASE_A), (B, LEASE_B)):
        end.begin(key, name)
    for block, key in ((0, third), (1, third), (0, A), (1, A), (2, A), (0, B), (1, B)):
        end.ready(block, key)
    end.done(A)
    end.done(B)
    assert [packed_next(end, seq) for seq in range(7)] == [[B], [B], [A], [A], [A], [third], []]


def test_an_attempt_that_ends_while_it_waits_is_passed_over() -> None:
    end = PrefillEnd(window=1)
    end.begin(A, LEASE_A)
    end.begin(B, LEASE_B)
    for block, key in ((0, B), (0, A), (1, A), (1, B)):
        end.ready(block, key)
    end.feed(Cancel(A))
    assert of_type(ReleasePrefill, end.actions) == [ReleasePrefill(A)]
    assert [packed_next(end, seq) for seq in range(2)] == [[B], []]
    assert end.state.waiting == {}


def test_deadlines_fall_due_in_order() -> None:
    end = PrefillEnd()
    end.begin(A, LEASE_A, deadline=20.0)
    end.begin(B, LEASE_B, deadline=10.0)
    end.feed(Tick(30.0))
    assert [report.key for report in of_type(ReportFailed, end.actions)] == [B, A]


def test_finish_drops_what_is_queued_and_waits_for_the_pack() -> None:
    end = PrefillEnd(window=1)
    end.begin()
    end.ready(0)
    end.ready(1)
    end.done(ended=True)
    assert end.said() == [Finish(LEASE_A)]
    assert not of_type(ReleasePrefill, end.actions)
    assert of_type(ReleasePrefill, end.packed(0)) == [ReleasePrefill(A)]
    end.sent(0)
    assert not of_type(Pack, end.hears(ChunksDone(1)))
    assert failed(end) == []


def test_cancel_amid_a_pack_releases_after_it_and_still_sends_the_number() -> None:
    end = PrefillEnd()
    end.begin()
    end.ready(0)
    end.feed(Cancel(A))
    assert end.said() == [Abort(LEASE_A, "cancelled")]
    assert of_type(AbortPrefill, end.actions)
    assert not of_type(ReleasePrefill, end.actions)
    end.packed(0)
    assert of_type(ReleasePrefill, end.actions) == [ReleasePrefill(A)]
    assert [send.seq for send in of_type(StartSend, end.actions)] == [0]
    assert failed(end) == []


@pytest.mark.parametrize(
    ("event", "code", "tells"),
    [
        (Tick(DEADLINE), "expired", True),
        (PrefillFailed(A, "busy"), "internal", True),
        (PeerLost(PEER, EPOCH, "gone"), "peer_lost", False),
    ],
)
@pytest.mark.parametrize("stage", ["computing", "streaming", "committing"])
def test_every_end_is_reported_once_from_every_state(event: object, code: str, tells: bool, stage: str) -> None:
    end = PrefillEnd()
    end.begin()
    if stage != "computing":
        end.ready(0)
        end.packed(0)
    if stage == "committing":
        end.done()
    end.feed(event)  # type: ignore[arg-type]
    assert failed(end) == [code]
    assert bool([message for message in end.said() if isinstance(message, Abort)]) is tells
    assert bool(of_type(AbortPrefill, end.actions)) is (stage != "committing" and code != "internal")
    assert of_type(ReleasePrefill, end.actions) == [ReleasePrefill(A)]
    for late in (Cancel(A), Tick(DEADLINE + 1), PrefillFailed(A, "late")):
        end.feed(late)
    end.hears(Committed(LEASE_A))
    end.hears(Abort(LEASE_A, "late"))
    assert len(of_type(ReportFailed, tuple(end.history))) == 1
    assert len(of_type(ReleasePrefill, tuple(end.history))) == 1


def test_an_abort_of_the_peer_is_not_echoed() -> None:
    end = PrefillEnd()
    end.begin()
    end.hears(Abort(LEASE_A, "unknown_lease"))
    assert end.said() == []
    assert failed(end) == ["aborted"]
    assert of_type(ReleasePrefill, end.actions)


def test_a_lost_epoch_pins_packs_and_slots_until_it_is_destroyed() -> None:
    end = PrefillEnd(window=2)
    end.begin()
    end.ready(0)
    end.ready(1)
    end.packed(0)
    end.feed(PeerLost(PEER, EPOCH, "gone"))
    assert of_type(DestroyEpoch, end.actions) == [DestroyEpoch(PEER, EPOCH, "gone")]
    assert not of_type(ReleasePrefill, end.actions)
    assert counters(end.state) == (1, 0, 2)
    assert end.packed(1) == ()
    end.feed(PeerConnected(PEER, "e2", 2))
    end.begin(B, LEASE_B)
    assert end.ready(0, B) == ()  # connected, but both slots are in quarantine
    end.feed(EpochDestroyed(PEER, EPOCH))
    assert of_type(ReleasePrefill, end.actions) == [ReleasePrefill(A)]
    assert [pack.epoch for pack in of_type(Pack, end.actions)] == ["e2"]
    assert counters(end.state) == (1, 1, 0)


def test_losing_an_epoch_twice_destroys_it_once() -> None:
    end = PrefillEnd()
    end.feed(PeerLost(PEER, EPOCH, "gone"))
    end.feed(PeerLost(PEER, EPOCH, "gone"))
    assert len(of_type(DestroyEpoch, tuple(end.history))) == 1


def test_a_new_epoch_tears_the_old_one_down_first() -> None:
    end = PrefillEnd()
    end.begin()
    end.feed(PeerConnected(PEER, "e2", 2))
    assert [destroy.epoch for destroy in of_type(DestroyEpoch, end.actions)] == [EPOCH]
    assert failed(end) == ["peer_lost"]
    end.hears(Abort(LEASE_A, "late"), EPOCH)
    end.feed(PeerLost(PEER, EPOCH, "late"))
    end.begin(B, LEASE_B)
    assert end.actions == (StartPrefill(B),)


def test_a_stalled_pair_is_torn_down_but_progress_defers_it() -> None:
    end = PrefillEnd()
    end.begin(deadline=1e6)
    end.ready(0)
    end.packed(0)
    end.feed(Tick(1.0))
    assert next_deadline(end.state) == 1.0 + STALL_TIMEOUT_S
    end.sent(0)
    end.feed(Tick(1.0 + STALL_TIMEOUT_S))
    assert not of_type(DestroyEpoch, end.actions)
    end.feed(Tick(1.0 + 2 * STALL_TIMEOUT_S))
    assert of_type(DestroyEpoch, end.actions)
    assert failed(end) == ["peer_lost"]


def test_an_idle_pair_never_stalls() -> None:
    end = PrefillEnd()
    end.begin(deadline=1e6)
    end.ready(0)
    end.packed(0)
    end.sent(0)
    end.hears(ChunksDone(1))
    for now in (1.0, 100.0, 1000.0):
        end.feed(Tick(now))
        assert end.actions == ()


def test_a_stale_event_does_not_move_the_deadline() -> None:
    end = PrefillEnd()
    end.begin(deadline=10.0)
    end.feed(Tick(5.0))
    end.begin(deadline=500.0)
    end.feed(SendDone(PEER, "e0", 0))
    end.feed(PrefillRequested(A, PEER, LEASE_A, 0, 500.0))
    assert next_deadline(end.state) == 10.0
    end.feed(Tick(10.0))
    assert failed(end) == ["expired"]


@pytest.mark.parametrize("packing", [True, False])
def test_what_the_engine_still_says_of_an_ended_attempt_is_ignored(packing: bool) -> None:
    end = PrefillEnd()
    end.begin()
    if packing:
        end.ready(0)
    end.feed(Cancel(A))
    before = end.state
    for late in (SegmentReady(A, segment(1), 64), PrefillDone(A, 32, 5, False), PrefillFailed(A, "late")):
        assert end.feed(late) == ()
    assert end.state == before


def test_segments_after_the_first_token_are_not_sent() -> None:
    end = PrefillEnd()
    end.begin()
    end.done()
    assert end.ready(0) == ()
    assert end.done() == ()


def test_a_late_clock_does_not_run_backwards() -> None:
    end = PrefillEnd()
    end.feed(Tick(50.0))
    end.feed(Tick(1.0))
    assert end.state.now == 50.0
