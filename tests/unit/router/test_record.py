"""The timeline of a request: the parts of the time to the first token sum to it, whatever workers report."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.common import events
from baton.common.clock import ManualClock
from router.policy import Decision, Predicted
from router.record import RecentRequests, RequestRecord

LOCAL = Decision("local", "why", Predicted(), "d0")
REMOTE = Decision("remote", "why", Predicted(0.2, 0.1), "d0", "p0")
STEP = st.floats(0, 3, allow_nan=False)


def begun(clock: ManualClock, request_id: str = "r") -> RequestRecord:
    return RequestRecord(request_id, 3, clock, clock.now())


@given(st.lists(STEP, min_size=5, max_size=5), st.lists(STEP, min_size=3, max_size=3), st.booleans())
def test_parts_sum_to_the_time_to_the_first_token(router_s: list[float], worker_s: list[float], remote: bool) -> None:
    clock = ManualClock(1234.567)
    record = begun(clock)
    clock.advance(router_s[0])
    record.begin_attempt(1, LOCAL)
    clock.advance(router_s[1])
    record.begin_attempt(2, REMOTE if remote else LOCAL)
    clock.advance(router_s[2])
    if remote:
        record.mark(events.OPENED)
        clock.advance(router_s[3])
        record.mark(events.RESERVED)
    clock.advance(router_s[4])
    record.count_tokens(1)
    recent = RecentRequests(1)
    recent.begin(record)
    for name, at_s in zip((events.PREFILL_START, events.PREFILL_END, events.TRANSFER_END), worker_s, strict=True):
        recent.add_worker_event("r", "p0" if remote else "d0", 2, name, at_s)
    parts = record.parts_us()
    assert parts is not None
    assert sum(parts.values()) == record.router_us(events.FIRST_TOKEN)
    assert all(value >= 0 for value in parts.values())
    assert parts["queued"] == round(router_s[0] * 1e6) or abs(parts["queued"] - router_s[0] * 1e6) < 1.5


def test_each_part_is_what_it_says() -> None:
    clock = ManualClock()
    record = begun(clock)
    clock.advance(0.010)
    record.begin_attempt(1, REMOTE)
    record.mark(events.OPENED)
    clock.advance(0.002)
    record.mark(events.RESERVED)
    clock.advance(0.100)
    record.count_tokens(1)
    for name, at_s in ((events.PREFILL_START, 0.030), (events.PREFILL_END, 0.090)):
        record.timeline.add("p0", 1, name, at_s)
    record.timeline.add("p0", 1, events.TRANSFER_START, 0.050)
    record.timeline.add("p0", 1, events.TRANSFER_END, 0.095)
    clock.advance(0.05)
    record.count_tokens(1)
    assert record.parts_us() == {
        "queued": 10_000,
        "retries": 0,
        "reserve": 2_000,
        "prefill_queue": 30_000,
        "prefill_compute": 60_000,
        "delivery": 10_000,
    }
    content = record.as_dict()
    assert (content["ttft_us"], content["second_token_us"], content["transfer_us"]) == (112_000, 162_000, 45_000)


def test_parts_belong_to_the_attempt_that_delivered_the_first_token() -> None:
    clock = ManualClock()
    record = begun(clock)
    record.begin_attempt(1, REMOTE)
    record.timeline.add("p0", 1, events.PREFILL_START, 0.0)
    record.timeline.add("p0", 1, events.PREFILL_END, 0.5)
    clock.advance(1.0)
    record.begin_attempt(2, LOCAL)
    clock.advance(0.1)
    record.count_tokens(1)
    parts = record.parts_us()
    assert parts is not None
    assert (parts["retries"], parts["prefill_compute"], parts["delivery"]) == (1_000_000, 0, 100_000)
    assert record.decision == LOCAL


def test_only_the_last_requests_are_kept_and_late_events_still_find_them() -> None:
    recent = RecentRequests(2)
    clock = ManualClock()
    for name in ("a", "b", "c"):
        record = begun(clock, name)
        record.begin_attempt(1, LOCAL)
        recent.begin(record)
        recent.end(record)
    assert recent.get("a") is None
    recent.add_worker_event("c", "d0", 1, events.FINISHED, 0.5)
    recent.add_worker_event("c", "d0", 9, events.FINISHED, 0.5)
    recent.add_worker_event("c", "d0", 1, "made up", 0.5)
    recent.add_worker_event("gone", "d0", 1, events.FINISHED, 0.5)
    kept = recent.get("c")
    assert kept is not None
    assert [event.name for event in kept.timeline.events if event.source == "d0"] == [events.FINISHED]


def test_requests_with_several_prompts_are_found_together() -> None:
    recent = RecentRequests(9)
    for name in ("g-0", "g-1", "h-0"):
        recent.begin(begun(ManualClock(), name))
    assert [record.request_id for record in recent.group("g")] == ["g-0", "g-1"]
    assert recent.group("x") == []
