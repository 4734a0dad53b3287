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


def connected() -> PairTable:
    pairs = table()
    pairs.report("p", "d", "connected", "")
    return pairs


def fail(pairs: PairTable, now: float) -> None:
    pairs.begin("p", "d").failed(now, "corrupt")


def test_a_failing_pair_rests_longer_each_time_and_is_tried_again() -> None:
    pairs = connected()
    rests = []
    now = 0.0
    for _ in range(12):
        fail(pairs, now)
        assert not pairs.schedulable(now)
        start = now
        while not pairs.schedulable(now):
            now += 0.25
        rests.append(now - start)
    assert rests[:3] == [0.5, 1.0, 2.0]
    assert max(rests) == rests[-1] == 30.0


def test_one_success_clears_the_failures() -> None:
    pairs = connected()
    for _ in range(5):
        fail(pairs, 0.0)
    pairs.begin("p", "d").succeeded()
    assert pairs.schedulable(0.0)
    fail(pairs, 0.0)
    assert pairs.schedulable(0.5)


def test_one_break_is_one_failure_however_many_hand_overs_it_meets() -> None:
    pairs = connected()
    under_way = [pairs.begin("p", "d") for _ in range(20)]
    for late, one in enumerate(under_way):
        one.failed(0.01 * late, "peer_lost")
    assert pairs.schedulable(0.5)


def test_behind_a_failure_one_hand_over_at_a_time_tries_the_pair() -> None:
    pairs = connected()
    earlier = pairs.begin("p", "d")
    fail(pairs, 0.0)
    probe = pairs.begin("p", "d")
    assert not pairs.schedulable(1.0), "a second one may not start before it is known what became of the first"
    earlier.succeeded()
    earlier.given_up()
    assert not pairs.schedulable(1.0), "what began before the failure says nothing of the pair since"
    probe.given_up()
    assert pairs.schedulable(1.0)
    assert pairs.all()[0].failures == 1
    probe = pairs.begin("p", "d")
    probe.succeeded()
    probe.failed(1.0, "late")
    assert pairs.schedulable(1.0)
    assert pairs.all()[0].failures == 0


def test_what_a_prefill_worker_reports_does_not_hide_why_a_pair_rests() -> None:
    pairs = connected()
    fail(pairs, 0.0)
    pairs.report("p", "d", "connected", "")
    (pair,) = pairs.all()
    assert (pair.state, pair.message, pair.failure) == ("connected", "", "corrupt")
    pairs.begin("p", "d").succeeded()
    assert pair.failure == ""


def test_hand_overs_that_cannot_prove_that_the_pair_works_keep_nobody_from_trying() -> None:
    pairs = connected()
    fail(pairs, 0.0)
    (pair,) = pairs.all()
    short = [pairs.begin("p", "d", may_prove=False) for _ in range(2)]
    assert pairs.schedulable(1.0)
    probe = pairs.begin("p", "d")
    short[0].given_up()
    assert pair.probing, "the probe is still under way"
    short[1].failed(1.0, "peer_lost")
    assert (pair.failures, pair.probing) == (2, False)
    probe.given_up()
    assert pairs.schedulable(2.0)


def test_a_lost_worker_takes_its_pairs_along() -> None:
    pairs = connected()
    pairs.introduce(hello("p"), hello("d2"))
    under_way = pairs.begin("p", "d")
    pairs.drop_worker("d")
    assert [(pair.prefill, pair.decode) for pair in pairs.all()] == [("p", "d2")]
    pairs.report("p", "d", "connected", "")
    under_way.failed(0.0, "late")
    assert not pairs.schedulable(0.0)
