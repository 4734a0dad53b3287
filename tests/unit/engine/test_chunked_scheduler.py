"""Who runs when: decodes always, prompts in order within the budget, nobody without room for its worst case."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.sampling import SamplingParams
from baton.engine.batch import ScheduledStep
from baton.engine.block_pool import BlockPool, Use
from baton.engine.prefix_cache import PrefixHit
from baton.engine.request import Request
from baton.engine.schedulers.chunked import ChunkedScheduler


def make(num_blocks: int = 100, seats: int = 8, budget: int = 32) -> tuple[ChunkedScheduler, BlockPool]:
    pool = BlockPool(num_blocks, 16, prefix_cache=False)
    return ChunkedScheduler(pool, seats, budget), pool


def a_request(name: str, length: int, max_tokens: int = 16, hand_over: bool = False) -> Request:
    return Request(name, [0] * length, SamplingParams(max_tokens=max_tokens), 0.0, hand_over=hand_over)


def chunks(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(segment.request.request_id, segment.start, segment.end) for segment in step.prefills]


def finish_step(step: ScheduledStep, scheduler: ChunkedScheduler, pool: BlockPool) -> None:
    """What the engine does after a step, with a token that never ends a request before its limit."""
    for request in step.decodes:
        request.num_computed_tokens += 1
    for segment in step.prefills:
        segment.request.num_computed_tokens = segment.end
    for request in step.sampled():
        request.token_ids.append(0)
        if request.hand_over or request.finish_reason() is not None:
            scheduler.remove(request)
            pool.release(request.request_id)


def test_prompts_share_the_budget_in_order() -> None:
    scheduler, pool = make()
    for name, length in (("a", 20), ("b", 40), ("c", 5)):
        scheduler.add(a_request(name, length))
    step = scheduler.schedule()
    assert chunks(step) == [("a", 0, 20), ("b", 0, 12)]
    finish_step(step, scheduler, pool)
    step = scheduler.schedule()
    assert [r.request_id for r in step.decodes] == ["a"]
    assert chunks(step) == [("b", 12, 40), ("c", 0, 3)]
    finish_step(step, scheduler, pool)
    step = scheduler.schedule()
    assert [r.request_id for r in step.decodes] == ["a", "b"]
    assert chunks(step) == [("c", 3, 5)]


def test_a_long_hand_over_has_its_steps_to_itself() -> None:
    """Two at once would both end late; short ones share a step that is not full, and what decodes here always may."""
    scheduler, pool = make(num_blocks=2000, budget=8192)
    for name, length in (("long", 4096), ("too long", 2000), ("a", 40), ("b", 8), ("c", 1)):
        scheduler.add(a_request(name, length, hand_over=True))
    scheduler.add(a_request("here", 3000))
    for expected in (["long"], ["too long", "a", "b"], ["c", "here"]):
        step = scheduler.schedule()
        assert [name for name, _, _ in chunks(step)] == expected
        finish_step(step, scheduler, pool)


def test_a_hand_over_does_not_delay_the_end_of_the_one_before() -> None:
    scheduler, pool = make(num_blocks=2000, budget=4096)
    scheduler.add(a_request("first", 4100, hand_over=True))
    scheduler.add(a_request("second", 4096, hand_over=True))
    for expected in ([("first", 0, 4096)], [("first", 4096, 4100)], [("second", 0, 4096)]):
        step = scheduler.schedule()
        assert chunks(step) == expected
        finish_step(step, scheduler, pool)


def test_the_worst_case_must_fit() -> None:
    scheduler, pool = make(num_blocks=4)
    scheduler.add(a_request("a", 16, max_tokens=32))
    scheduler.add(a_request("b", 1, max_tokens=16))
    scheduler.add(a_request("c", 1, max_tokens=1))
    step = scheduler.schedule()
    assert chunks(step) == [("a", 0, 16)]
    assert pool.counts().running == 1
    assert scheduler.is_blocked
    assert len(scheduler.waiting) == 2
    for _ in range(31):
        finish_step(step, scheduler, pool)
        step = scheduler.schedule()
        assert not step.prefills
    finish_step(step, scheduler, pool)
    assert chunks(scheduler.schedule()) == [("b", 0, 1), ("c", 0, 1)]
    assert not scheduler.is_blocked


def test_the_worst_case_is_not_taken_before_it_is_needed() -> None:
    scheduler, pool = make()
    scheduler.add(a_request("a", 10, max_tokens=100))
    finish_step(scheduler.schedule(), scheduler, pool)
    for _ in range(6):
        finish_step(scheduler.schedule(), scheduler, pool)
        assert pool.counts().running == 1
    finish_step(scheduler.schedule(), scheduler, pool)
    assert pool.counts().running == 2


def test_a_hand_over_takes_its_prompt_at_once_and_no_more() -> None:
    scheduler, pool = make(num_blocks=7)
    scheduler.add(a_request("a", 100, max_tokens=500, hand_over=True))
    assert chunks(scheduler.schedule()) == [("a", 0, 32)]
    assert pool.counts().running == 7
    assert pool.committed == 7


def test_seats_count_reserved_ones() -> None:
    scheduler, _ = make(seats=2)
    scheduler.reserve_seat("lease")
    for name in "ab":
        scheduler.add(a_request(name, 4))
    assert chunks(scheduler.schedule()) == [("a", 0, 4)]
    assert not scheduler.has_seat()
    scheduler.free_seat("lease")
    scheduler.free_seat("lease")
    assert ("b", 0, 4) in chunks(scheduler.schedule())


def test_an_admitted_request_decodes_at_once() -> None:
    scheduler, pool = make()
    request = a_request("a", 16)
    request.block_table = pool.open("a", 2, PrefixHit(), Use.RUNNING)
    pool.grow("a", 1)
    request.num_computed_tokens = 16
    request.token_ids.append(5)
    scheduler.admit(request)
    assert scheduler.schedule().decodes == (request,)
    assert len(request.block_table) == 2


def test_a_removed_request_is_not_scheduled() -> None:
    scheduler, _ = make(budget=4)
    requests = [a_request(name, 10) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    assert chunks(scheduler.schedule()) == [("a", 0, 4)]
    for request in requests:
        scheduler.remove(request)
    assert not scheduler.schedule()


def test_a_budget_below_the_seats_still_lets_prompts_through() -> None:
    scheduler, pool = make(seats=8, budget=2)
    for name in "abc":
        scheduler.add(a_request(name, 3, max_tokens=4))
    steps = 0
    while step := scheduler.schedule():
        assert len(step.decodes) + step.num_prefill_tokens <= 2
        finish_step(step, scheduler, pool)
        steps += 1
    assert steps < 30
    assert pool.counts().free == 100


@settings(deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 80), st.integers(1, 40), st.booleans()), min_size=1, max_size=12),
    num_blocks=st.integers(8, 20),
    seats=st.integers(1, 5),
    budget=st.integers(1, 64),
)
def test_everybody_gets_through(lengths: list[tuple[int, int, bool]], num_blocks: int, seats: int, budget: int) -> None:
    """No deadlock, no step over budget, first come first served at the start of prefills."""
    scheduler, pool = make(num_blocks, seats, budget)
    requests = [a_request(str(n), length, more, hand) for n, (length, more, hand) in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    started: list[str] = []
    while step := scheduler.schedule():
        assert len(step.decodes) + step.num_prefill_tokens <= budget
        assert len(scheduler.running) <= seats
        assert pool.committed <= num_blocks
        started += [segment.request.request_id for segment in step.prefills if segment.is_first]
        for request in step.requests():
            assert len(request.block_table) * 16 > request.num_computed_tokens
        finish_step(step, scheduler, pool)
    assert started == [request.request_id for request in requests]
    assert all(r.num_output_tokens == (1 if r.hand_over else r.sampling.max_tokens) for r in requests)
    assert pool.counts().free == num_blocks
