"""Which pairs may hand over: connected, compatible, and not resting after a failure."""

from __future__ import annotations

from protos import worker_pb2 as pb
from router.pairs import INCOMPATIBLE, PairTable
from tests.support.fake_worker import LAYOUT


def hello(worker_id: str, **layout: object) -> pb.WorkerHello:
    described = pb.KVLayout()
    described.CopyFrom(LAYOUT)
    for name, value in layout.items():
        setattr(described, name, value)
    return pb.WorkerHello(worker_id=worker_id, layout=described)


def table() -> PairTable:
    pairs = PairTable()
    pairs.introduce(hello("p"), hello("d"))
    return pairs


def test_a_pair_is_schedulable_only_while_connected() -> None:
    pairs = table()
    seen = [pairs.schedulable(0.0)]
    for state in ("connected", "lost", "connected", "refused"):
        pairs.report("p", "d", state, "")
        seen.append(pairs.schedulable(0.0))
    assert [bool(ids) for ids in seen] == [False, True, False, True, False]


def test_every_difference_of_an_incompatible_pair_is_named_and_no_report_makes_it_schedulable() -> None:
    pairs = PairTable()
    pair = pairs.introduce(hello("p", dtype="float16"), hello("d", block_size=32))
    assert pair.state == INCOMPATIBLE
    assert "dtype: prefill 'float16', decode 'float32'" in pair.message
    assert "block_size: prefill 16, decode 32" in pair.message
    pairs.report("p", "d", "connected", "")
    assert not pairs.schedulable(0.0)


def test_a_failing_pair_rests_longer_each_time_and_is_tried_again() -> None:
    pairs = table()
    pairs.report("p", "d", "connected", "")
    rests = []
    now = 0.0
    for _ in range(12):
        pairs.handover_failed("p", "d", now, "corrupt")
        assert not pairs.schedulable(now)
        start = now
        while not pairs.schedulable(now):
            now += 0.25
        rests.append(now - start)
    assert rests[:3] == [0.5, 1.0, 2.0]
    assert max(rests) == rests[-1] == 30.0


def test_one_success_clears_the_failures() -> None:
    pairs = table()
    pairs.report("p", "d", "connected", "")
    for _ in range(5):
        pairs.handover_failed("p", "d", 0.0, "corrupt")
    pairs.handover_succeeded("p", "d")
    assert pairs.schedulable(0.0)
    pairs.handover_failed("p", "d", 0.0, "corrupt")
    assert pairs.schedulable(0.5)


def test_a_lost_worker_takes_its_pairs_along() -> None:
    pairs = table()
    pairs.introduce(hello("p"), hello("d2"))
    pairs.drop_worker("d")
    assert [(pair.prefill, pair.decode) for pair in pairs.all()] == [("p", "d2")]
    pairs.report("p", "d", "connected", "")
    pairs.handover_failed("p", "d", 0.0, "late")
    assert not pairs.schedulable(0.0)
