"""The decode end of the hand-over, one rule per test."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kv_transfer.events import (
    Admit,
    BlocksRefused,
    Cancel,
    DestroyEpoch,
    EpochDestroyed,
    FromPrefill,
    PeerConnected,
    PeerLost,
    Received,
    ReleaseLease,
    ReportFailed,
    ReportRefused,
    ReportReserved,
    ReserveBlocks,
    StartRecv,
    Tick,
    Unpack,
)
from kv_transfer.messages import Abort, Chunk, ChunksDone, Commit, Committed, Finish, LeaseKey, Segment
from kv_transfer.protocol import STALL_TIMEOUT_S, counters, next_deadline
from tests.transfer.protocol_harness import DEADLINE, EPOCH, LEASE_A, LEASE_B, PEER, A, B, DecodeEnd, of_type, segment

COMMIT = Commit(LEASE_A, 32, 2, 5)


def codes(end: DecodeEnd) -> list[str]:
    actions = (action for action in end.history if isinstance(action, ReportFailed | ReportRefused))
    return [action.code for action in actions]


def test_open_without_a_connection_is_refused() -> None:
    end = DecodeEnd(connect=False)
    end.open()
    assert codes(end) == ["no_connection"]
    assert counters(end.state).live == 0


def test_open_past_its_deadline_is_refused() -> None:
    end = DecodeEnd()
    end.feed(Tick(DEADLINE))
    end.open()
    assert codes(end) == ["expired"]


def test_refusal_of_the_engine_is_passed_on_once() -> None:
    end = DecodeEnd()
    end.open()
    end.feed(BlocksRefused(1, "busy", "no room"))
    end.feed(BlocksRefused(1, "busy", "no room"))
    end.open()
    assert codes(end) == ["busy"]


def test_whole_hand_over_admits_exactly_once() -> None:
    end = DecodeEnd()
    assert end.open() == (ReserveBlocks(A, 1),)
    assert end.reserve() == (ReportReserved(A, LEASE_A, 0),)
    assert end.chunk(0, 0) == (StartRecv(PEER, EPOCH, 0, 0, 64),)
    assert end.received(0) == (Unpack(PEER, EPOCH, 0, 0, LEASE_A, segment(0), (0,)),)
    end.unpacked(0)
    assert end.said() == [ChunksDone(1)]
    end.chunk(1, 1)
    end.received(1)
    assert end.hears(COMMIT) == ()
    end.unpacked(1)
    assert of_type(Admit, end.actions) == [Admit(A, LEASE_A, 32, 5)]
    assert end.said() == [Committed(LEASE_A), ChunksDone(2)]
    end.hears(COMMIT)
    assert end.said() == [Abort(LEASE_A, "unknown_lease")]
    assert counters(end.state) == (0, 0, 0)
    assert next_deadline(end.state) is None
    assert not of_type(ReleaseLease, tuple(end.history))


def test_a_fully_cached_prompt_is_admitted_without_a_chunk() -> None:
    end = DecodeEnd()
    end.lease(first_block=2)
    end.hears(replace(COMMIT, num_chunks=0))
    assert of_type(Admit, end.actions)


@pytest.mark.parametrize(
    "commit",
    [replace(COMMIT, num_chunks=1), replace(COMMIT, num_chunks=3), replace(COMMIT, num_tokens=31)],
)
def test_a_commit_that_does_not_add_up_ends_the_lease(commit: Commit) -> None:
    end = DecodeEnd()
    end.lease()
    end.take(0, 0)
    end.take(1, 1)
    end.hears(commit)
    assert codes(end) == ["incomplete"]
    assert end.said() == [Abort(LEASE_A, "incomplete")]
    assert of_type(ReleaseLease, end.actions) == [ReleaseLease(A, LEASE_A)]


@pytest.mark.parametrize(
    "second", [segment(0), segment(2), Segment(0, 3, 1, 2), Segment(1, 2, 0, 1), Segment(0, 2, 1, 1)]
)
def test_a_segment_that_is_not_wanted_is_dropped_and_spoils_the_commit(second: Segment) -> None:
    end = DecodeEnd()
    end.lease()
    end.take(0, 0)
    end.hears(Chunk(1, LEASE_A, second, 64, (1,)))
    end.received(1)
    assert not of_type(Unpack, end.actions)
    assert end.said() == [ChunksDone(2)]
    end.hears(COMMIT)
    assert codes(end) == ["incomplete"]


def test_one_segment_in_flight_twice_is_unpacked_once() -> None:
    end = DecodeEnd()
    end.lease()
    end.chunk(0, 0)
    end.chunk(1, 0)
    end.received(0)
    assert end.received(1) == ()


def test_unknown_leases_are_received_dropped_and_disowned() -> None:
    end = DecodeEnd()
    end.lease()
    for seq, name in enumerate((LeaseKey(9, 9), LeaseKey(LEASE_A.lease, LEASE_A.generation - 1))):
        end.chunk(seq, 0, name)
        assert of_type(StartRecv, end.actions)
        assert end.said() == [Abort(name, "unknown_lease")]
        assert not of_type(Unpack, end.received(seq))
    end.hears(Commit(LeaseKey(9, 9), 32, 0, 5))
    assert end.said() == [Abort(LeaseKey(9, 9), "unknown_lease")]


def test_another_peers_lease_is_unknown() -> None:
    end = DecodeEnd()
    end.lease()
    end.feed(PeerConnected("other", "o1", 2))
    end.feed(FromPrefill("other", "o1", Chunk(0, LEASE_A, segment(0), 64, (0,))))
    assert end.said() == [Abort(LEASE_A, "unknown_lease")]
    assert not of_type(Unpack, end.feed(Received("other", "o1", 0)))


def test_corrupt_ends_the_lease_and_the_other_unpack_pins_it() -> None:
    end = DecodeEnd()
    end.lease()
    for seq in (0, 1):
        end.chunk(seq, seq)
        end.received(seq)
    end.unpacked(0, ok=False)
    assert codes(end) == ["corrupt"]
    assert Abort(LEASE_A, "corrupt") in end.said()
    assert not of_type(ReleaseLease, end.actions)
    end.unpacked(1)
    assert of_type(ReleaseLease, end.actions) == [ReleaseLease(A, LEASE_A)]


def test_credits_return_in_order() -> None:
    end = DecodeEnd()
    end.lease()
    for seq in (0, 1):
        end.chunk(seq, seq)
        end.received(seq)
    end.unpacked(1)
    assert end.said() == []
    end.unpacked(0)
    assert end.said() == [ChunksDone(2)]


def test_gap_and_excess_tear_the_epoch_down_but_a_repeat_does_not() -> None:
    gap = DecodeEnd()
    gap.lease()
    gap.chunk(1, 0)
    assert of_type(DestroyEpoch, gap.actions)
    excess = DecodeEnd(window=1)
    excess.lease()
    excess.chunk(0, 0)
    assert excess.chunk(0, 0) == ()
    excess.chunk(1, 1)
    assert of_type(DestroyEpoch, excess.actions)
    assert codes(gap) == codes(excess) == ["peer_lost"]


def test_a_dead_epoch_has_no_say() -> None:
    end = DecodeEnd()
    end.lease()
    assert end.chunk(0, 0, epoch="e0") == ()
    end.feed(PeerLost(PEER, "e0", "late"))
    assert codes(end) == []


def test_losing_the_peer_fails_untouched_leases_too_and_pins_the_unpacking_one() -> None:
    end = DecodeEnd()
    end.lease(A, LEASE_A)
    end.lease(B, LEASE_B)
    end.chunk(0, 0)
    end.received(0)
    end.chunk(1, 1)
    end.feed(PeerLost(PEER, EPOCH, "gone"))
    assert codes(end) == ["peer_lost", "peer_lost"]
    assert end.said() == []
    assert of_type(ReleaseLease, end.actions) == [ReleaseLease(B, LEASE_B)]
    assert counters(end.state) == (1, 0, 2)
    assert end.unpacked(0) == ()
    assert of_type(ReleaseLease, end.feed(EpochDestroyed(PEER, EPOCH))) == [ReleaseLease(A, LEASE_A)]
    assert counters(end.state) == (0, 0, 0)


def test_a_new_epoch_waits_for_quarantined_slots() -> None:
    end = DecodeEnd(window=1)
    end.lease()
    end.chunk(0, 0)
    end.feed(PeerConnected(PEER, "e2", 1))
    end.lease(B, LEASE_B)
    assert end.chunk(0, 0, LEASE_B, "e2") == ()
    assert end.feed(EpochDestroyed(PEER, EPOCH)) == (StartRecv(PEER, "e2", 0, 0, 64),)


@pytest.mark.parametrize("event", [Cancel(A), Tick(DEADLINE), PeerLost(PEER, EPOCH, "gone")])
@pytest.mark.parametrize("reserved", [True, False])
def test_an_end_while_opening_waits_for_the_engine(event: object, reserved: bool) -> None:
    end = DecodeEnd()
    end.open()
    end.feed(event)  # type: ignore[arg-type]
    assert end.said() == []
    reports = len(codes(end))
    if reserved:
        assert end.reserve() == (ReleaseLease(A, LEASE_A),)
    else:
        assert end.feed(BlocksRefused(1, "busy", "")) == ()
    assert counters(end.state).live == 0
    assert len(codes(end)) == reports == (0 if isinstance(event, Cancel) else 1)


@pytest.mark.parametrize(
    ("event", "code", "tells"),
    [(Cancel(A), None, True), (Tick(DEADLINE), "expired", True), (PeerLost(PEER, EPOCH, "gone"), "peer_lost", False)],
)
def test_every_end_of_a_reserved_lease_is_told_and_releases_once(event: object, code: str | None, tells: bool) -> None:
    end = DecodeEnd()
    end.lease()
    end.feed(event)  # type: ignore[arg-type]
    assert codes(end) == ([code] if code else [])
    assert bool(end.said()) is tells
    assert of_type(ReleaseLease, end.actions) == [ReleaseLease(A, LEASE_A)]
    for late in (Cancel(A), Tick(DEADLINE + 1), PeerLost(PEER, EPOCH, "late")):
        end.feed(late)
    assert len(of_type(ReleaseLease, tuple(end.history))) == 1


def test_abort_and_finish_of_the_peer_release_without_an_echo() -> None:
    for message, expected in ((Abort(LEASE_A, "cancelled"), ["aborted"]), (Finish(LEASE_A), [])):
        end = DecodeEnd()
        end.lease()
        end.hears(message)
        assert end.said() == []
        assert codes(end) == expected
        assert of_type(ReleaseLease, end.actions)
        end.hears(message)
        assert end.actions == ()


def test_expiry_waits_for_an_unpack_in_flight() -> None:
    end = DecodeEnd()
    end.lease()
    end.chunk(0, 0)
    end.received(0)
    end.feed(Tick(DEADLINE))
    assert codes(end) == ["expired"]
    assert not of_type(ReleaseLease, end.actions)
    assert of_type(ReleaseLease, end.unpacked(0)) == [ReleaseLease(A, LEASE_A)]


def test_a_repeated_open_does_not_restart_the_deadline() -> None:
    end = DecodeEnd()
    end.open(deadline=10.0)
    end.reserve()
    assert end.open(deadline=500.0) == ()
    assert next_deadline(end.state) == 10.0
    end.feed(Tick(10.0))
    assert codes(end) == ["expired"]


def test_a_receive_that_never_completes_tears_the_epoch_down() -> None:
    end = DecodeEnd()
    end.open(deadline=1e6)
    end.reserve()
    end.chunk(0, 0)
    end.feed(Tick(1.0))
    end.feed(Tick(1.0 + STALL_TIMEOUT_S))
    assert of_type(DestroyEpoch, end.actions)
    assert codes(end) == ["peer_lost"]


def test_lease_numbers_never_repeat() -> None:
    end = DecodeEnd()
    end.open(A)
    end.feed(BlocksRefused(1, "busy", ""))
    assert end.open(B) == (ReserveBlocks(B, 2),)
