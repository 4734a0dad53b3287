"""What is measured of a hand-over, and that nothing is kept of what has ended."""

from __future__ import annotations

import pytest

from kv_transfer.timeline import BOUNDS_S, Histogram, Timeline


def _timeline(*epochs: str) -> Timeline:
    timeline = Timeline()
    for epoch in epochs:
        timeline.epoch_begun(epoch)
    return timeline


def test_a_hand_over_is_exposed_from_its_last_written_kv_until_it_is_admissible() -> None:
    timeline = _timeline("e")
    timeline.reserved(7)
    for seq, written_at in ((0, 1.0), (1, 3.0), (2, 2.0)):
        timeline.announced("e", seq, 7, 100, written_at, now=4.0 + seq)
        timeline.posted("e", seq, now=4.25 + seq)
        timeline.received("e", seq, now=4.5 + seq)
        timeline.verified("e", seq, now=4.75 + seq)
    timeline.committed(7, now=7.0)
    timeline.admissible(7, "r", 33, now=7.5)
    [times] = timeline.hand_overs()
    assert (times.request_id, times.num_tokens, times.num_chunks, times.num_bytes) == ("r", 33, 3, 300)
    assert (times.first_announced_at, times.verified_at, times.committed_at) == (4.0, 6.75, 7.0)
    assert times.exposed_s == 4.5
    assert [(chunk.seq, chunk.posted_at, chunk.verified_at) for chunk in timeline.chunks()] == [
        (0, 4.25, 4.75),
        (1, 5.25, 5.75),
        (2, 6.25, 6.75),
    ]
    totals = timeline.totals()
    assert (totals.num_bytes, totals.num_chunks, totals.num_hand_overs) == (300, 3, 1)
    assert totals.receive_posted.total == pytest.approx(0.75)
    assert sum(totals.exposed.counts) == 1


def test_without_a_common_clock_nothing_is_called_exposed() -> None:
    timeline = _timeline("e")
    timeline.reserved(7)
    timeline.announced("e", 0, 7, 100, None, now=4.0)
    timeline.admissible(7, "r", 33, now=7.5)
    assert timeline.hand_overs()[0].exposed_s is None
    assert sum(timeline.totals().exposed.counts) == 0


def test_what_has_ended_is_not_kept() -> None:
    timeline = _timeline("e", "f")
    timeline.reserved(1)
    timeline.lease_ended(1)
    timeline.announced("e", 0, 1, 100, None, now=1.0)
    timeline.committed(1, now=1.0)
    timeline.announced("e", 1, 2, 100, None, now=1.0)
    timeline.announced("f", 0, 3, 100, None, now=1.0)
    timeline.done("e", 1)
    assert set(timeline._open) == {("e", 1), ("f", 0)}
    timeline.epoch_ended("e")
    assert set(timeline._open) == {("f", 0)}
    assert timeline._leases == {}


def test_what_a_stream_says_after_the_end_of_its_epoch_is_not_kept() -> None:
    timeline = _timeline("e")
    timeline.announced("e", 0, 1, 100, None, now=1.0)
    timeline.epoch_ended("e")
    timeline.announced("e", 0, 1, 100, None, now=2.0)
    timeline.announced("e", 1, 1, 100, None, now=2.0)
    timeline.done("e", 1)
    assert (timeline._open, timeline._done) == ({}, {})


def test_a_chunk_that_is_told_twice_counts_once_and_is_not_kept() -> None:
    timeline = _timeline("e")
    timeline.reserved(1)
    for _ in range(2):
        timeline.announced("e", 0, 1, 100, None, now=1.0)
    timeline.verified("e", 0, now=2.0)
    timeline.done("e", 1)
    timeline.announced("e", 0, 1, 100, None, now=3.0)
    assert timeline._open == {}
    timeline.admissible(1, "r", 33, now=4.0)
    assert timeline.hand_overs()[0].num_chunks == 1
    timeline.epoch_ended("e")
    assert timeline._done == {}


def test_a_chunk_whose_receipt_is_told_twice_counts_once() -> None:
    timeline = _timeline("e")
    timeline.announced("e", 0, 1, 100, None, now=1.0)
    for now in (2.0, 3.0):
        timeline.received("e", 0, now)
    timeline.verified("e", 0, now=4.0)
    assert timeline.chunks()[0].received_at == 2.0
    assert (timeline.totals().num_bytes, timeline.totals().num_chunks) == (100, 1)


def test_a_sample_on_a_bound_belongs_below_it() -> None:
    histogram = Histogram()
    for seconds in (BOUNDS_S[0], BOUNDS_S[0] * 1.01, 100.0):
        histogram.add(seconds)
    assert histogram.counts == [1, 1, *[0] * (len(BOUNDS_S) - 2), 1]
