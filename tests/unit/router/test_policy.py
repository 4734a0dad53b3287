"""The path decision: always a worker that can take the request, always the predicted minimum, always a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.common.config import PathPolicy
from router.policy import Cluster, Decision, RequestFacts, StepTimes, Wait, WorkerSnapshot, decide

SECONDS = st.floats(0, 1, allow_nan=False)
STEP = st.builds(StepTimes, SECONDS, st.floats(0, 0.01), st.floats(0, 0.01))
POLICIES = st.sampled_from(["local", "remote", "auto"])


def worker(worker_id: str, *, can_decode: bool = True, **fields: object) -> WorkerSnapshot:
    snapshot = WorkerSnapshot(worker_id, can_decode, 1000, 512, StepTimes(0.01, 0.0001, 0.001), 0, 0)
    return replace(snapshot, **fields)  # type: ignore[arg-type]


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    workers = [
        WorkerSnapshot(
            worker_id=f"{'d' if can_decode else 'p'}{index}",
            can_decode=can_decode,
            capacity=draw(st.integers(1, 2000)),
            max_num_batched_tokens=draw(st.integers(1, 4096)),
            step=draw(st.none() | STEP),
            queued_prefill_tokens=draw(st.integers(0, 5000)),
            num_requests=draw(st.integers(0, 64)),
            has_room=draw(st.booleans()),
        )
        for can_decode in (True, False)
        for index in range(draw(st.integers(0, 3)))
    ]
    ids = [(p.worker_id, d.worker_id) for p in workers if not p.can_decode for d in workers if d.can_decode]
    return Cluster(workers, draw(st.frozensets(st.sampled_from(ids))) if ids else frozenset())


@given(POLICIES, clusters(), st.integers(1, 1500), st.integers(1, 500))
def test_only_workers_that_can_take_the_request_are_chosen(
    policy: PathPolicy, cluster: Cluster, num_prompt: int, max_tokens: int
) -> None:
    choice = decide(policy, RequestFacts(num_prompt, max_tokens), cluster, 0.5)
    by_id = {w.worker_id: w for w in cluster.workers}
    assert choice.reason
    if isinstance(choice, Wait):
        return
    chosen = by_id[choice.worker]
    assert chosen.has_room
    assert num_prompt + max_tokens <= chosen.capacity
    assert (choice.path == "remote") == (choice.prefill_worker is not None)
    if choice.prefill_worker is not None:
        assert policy != "local"
        assert (choice.prefill_worker, choice.worker) in cluster.connected
        assert by_id[choice.prefill_worker].has_room
        assert num_prompt <= by_id[choice.prefill_worker].capacity


@given(clusters(), st.integers(1, 1500))
def test_auto_takes_the_smaller_prediction_and_says_both(cluster: Cluster, num_prompt: int) -> None:
    choice = decide("auto", RequestFacts(num_prompt, 1), cluster, float("inf"))
    if isinstance(choice, Wait) or choice.predicted.local_s is None or choice.predicted.remote_s is None:
        return
    local_s, remote_s = choice.predicted.local_s, choice.predicted.remote_s
    assert choice.path == ("remote" if remote_s < local_s else "local")
    assert f"{local_s:.4f}" in choice.reason
    assert f"{remote_s:.4f}" in choice.reason


@given(clusters(), st.integers(1, 1500))
def test_a_lease_is_opened_only_below_the_queue_bound(cluster: Cluster, num_prompt: int) -> None:
    choice = decide("remote", RequestFacts(num_prompt, 1), cluster, 0.5)
    if isinstance(choice, Decision) and choice.prefill_worker is not None:
        prefill = next(w for w in cluster.workers if w.worker_id == choice.prefill_worker)
        if prefill.step is not None:
            assert prefill.queued_prefill_tokens * prefill.step.per_prefill_token_s < 0.5


def test_unknown_timings_go_local() -> None:
    cluster = Cluster([worker("d", step=None), worker("p", can_decode=False, step=None)], frozenset({("p", "d")}))
    choice = decide("auto", RequestFacts(100, 10), cluster, 0.5)
    assert isinstance(choice, Decision)
    assert (choice.path, choice.reason) == ("local", "auto: no step timings yet")


def test_a_tie_goes_local() -> None:
    cluster = Cluster([worker("d"), worker("p", can_decode=False)], frozenset({("p", "d")}))
    choice = decide("auto", RequestFacts(100, 10), cluster, 0.5)
    assert isinstance(choice, Decision)
    assert choice.predicted.local_s == choice.predicted.remote_s
    assert choice.path == "local"


def test_a_loaded_decode_worker_hands_long_prompts_over() -> None:
    loaded = worker("d", num_requests=50, queued_prefill_tokens=400)
    cluster = Cluster([loaded, worker("p", can_decode=False)], frozenset({("p", "d")}))
    choice = decide("auto", RequestFacts(900, 10), cluster, 0.5)
    assert isinstance(choice, Decision)
    assert (choice.path, choice.worker, choice.prefill_worker) == ("remote", "d", "p")


def test_an_unmeasured_prefill_worker_is_assumed_like_the_measured_ones() -> None:
    loaded = worker("d", num_requests=50, queued_prefill_tokens=400)
    cluster = Cluster([loaded, worker("p", can_decode=False, step=None)], frozenset({("p", "d")}))
    choice = decide("auto", RequestFacts(900, 10), cluster, 0.5)
    assert isinstance(choice, Decision)
    assert choice.path == "remote"


def test_remote_without_a_pair_goes_local_and_says_why() -> None:
    cluster = Cluster([worker("d"), worker("p", can_decode=False)])
    choice = decide("remote", RequestFacts(100, 10), cluster, 0.5)
    assert isinstance(choice, Decision)
    assert (choice.path, choice.reason) == ("local", "remote asked for, no prefill worker connected")


def test_a_failed_hand_over_is_retried_on_one_worker() -> None:
    cluster = Cluster([worker("d"), worker("p", can_decode=False)], frozenset({("p", "d")}))
    choice = decide("remote", RequestFacts(100, 10, keep_local="local because the hand-over failed"), cluster, 0.5)
    assert isinstance(choice, Decision)
    assert (choice.path, choice.reason) == ("local", "local because the hand-over failed")


def test_a_full_prefill_worker_makes_the_request_wait() -> None:
    full = worker("p", can_decode=False, queued_prefill_tokens=20_000)
    choice = decide("remote", RequestFacts(100, 10), Cluster([worker("d"), full], frozenset({("p", "d")})), 0.5)
    assert isinstance(choice, Wait)
    assert not choice.no_worker
    assert "p" in choice.reason


def test_without_decode_workers_a_prefill_worker_serves_alone() -> None:
    choice = decide("auto", RequestFacts(100, 10), Cluster([worker("p", can_decode=False)]), 0.5)
    assert isinstance(choice, Decision)
    assert (choice.path, choice.worker) == ("local", "p")


def test_no_worker_at_all_is_told_from_no_room() -> None:
    empty = decide("auto", RequestFacts(1, 1), Cluster([]), 0.5)
    full = decide("auto", RequestFacts(1, 1), Cluster([worker("d", has_room=False)]), 0.5)
    assert isinstance(empty, Wait)
    assert isinstance(full, Wait)
    assert (empty.no_worker, full.no_worker) == (True, False)


def test_requests_spread_over_decode_workers() -> None:
    cluster = Cluster([worker("d0", num_requests=3), worker("d1", num_requests=2)])
    choice = decide("local", RequestFacts(10, 1), cluster, 0.5)
    assert isinstance(choice, Decision)
    assert choice.worker == "d1"


def test_a_worker_that_never_saw_a_prompt_is_not_thought_to_compute_one_for_nothing() -> None:
    """Otherwise a decode worker of a disaggregated cluster would look like the fastest place for every prompt."""
    decode = worker("d", step=StepTimes(0.005, 0.0, 0.0001), num_requests=8)
    prefill = worker("p", can_decode=False, step=StepTimes(0.001, 0.00002, 0.0))
    choice = decide("auto", RequestFacts(900, 16), Cluster([decode, prefill], frozenset({("p", "d")})), 0.5)
    assert isinstance(choice, Decision)
    assert choice.path == "remote"
    assert choice.predicted.local_s == pytest.approx(2 * (0.005 + 8 * 0.0001) + 900 * 0.00002)
