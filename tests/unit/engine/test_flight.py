"""While the device computes, the engine thread listens: what arrives is handled then, and joins the very next step."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.common.clock import ManualClock
from baton.engine.batch import PrefillSegment, ScheduledStep
from baton.engine.flight import Flight, Pacer
from baton.engine.inbox import Inbox
from baton.engine.logprobs import StepLogprobs
from baton.engine.ports import Admission, Refusal, Reservation, Reserve
from baton.engine.runner import LaunchedStep
from tests.support.engine_harness import Harness, greedy, make_harness, random_prompt
from tests.support.tiny_model import make_tiny_llama


class SlowTokens:
    """The tokens of a step that ends when it is told to."""

    def __init__(self, tokens: list[int] | None = None) -> None:
        self.ended = threading.Event()
        self._tokens = tokens or []

    def is_ready(self) -> bool:
        return self.ended.is_set()

    def wait(self) -> list[int]:
        assert self.ended.wait(10.0)
        return self._tokens


def flight(tokens: SlowTokens, started: float, step: ScheduledStep | None = None) -> Flight:
    return Flight(step or ScheduledStep(), (), tokens, StepLogprobs(), started)


def over_prompt(num_tokens: int) -> ScheduledStep:
    request = greedy("prompt", [1] * num_tokens, 1)
    return ScheduledStep(prefills=(PrefillSegment(request, 0, num_tokens),))


def paced(lead_s: float | None, decode_s: float) -> tuple[Pacer, Inbox, ManualClock]:
    """A pacer that has seen a few steps, the fastest of which took `decode_s`."""
    clock, inbox = ManualClock(), Inbox()
    pacer = Pacer(inbox, clock, lead_s)
    for seconds in (decode_s + 1.0, decode_s, decode_s + 2.0):
        started = clock.now()
        clock.advance(seconds)
        assert pacer.landed(flight(SlowTokens(), started)) == pytest.approx(seconds)
    return pacer, inbox, clock


def test_a_step_s_time_begins_where_the_one_before_ended() -> None:
    """It was launched earlier, but could not run; and what ran after a pause counts from its launch."""
    clock = ManualClock()
    pacer = Pacer(Inbox(), clock, None)
    clock.advance(1.0)
    pacer.landed(flight(SlowTokens(), 0.0))
    clock.advance(0.25)
    assert pacer.landed(flight(SlowTokens(), 0.5)) == pytest.approx(0.25)
    clock.advance(5.0)
    assert pacer.landed(flight(SlowTokens(), 6.0)) == pytest.approx(0.25)


def test_news_end_the_wait_for_a_step() -> None:
    pacer, inbox, clock = paced(None, decode_s=60.0)
    running = flight(SlowTokens(), clock.now())
    inbox.wake()
    assert not pacer.await_landing(running)
    inbox.drain()
    clock.advance(60.0)
    assert pacer.await_landing(running)


def test_the_end_of_a_step_of_unknown_length_is_noticed() -> None:
    tokens = SlowTokens()
    timer = threading.Timer(0.02, tokens.ended.set)
    timer.start()
    assert Pacer(Inbox(), ManualClock(), None).await_landing(flight(tokens, 0.0))
    assert tokens.ended.is_set()
    timer.join()


def test_a_step_over_a_prompt_is_waited_for_like_one_of_its_size() -> None:
    """Its first token goes out when it is drawn, not when somebody looks; and nothing is held back for its sake."""
    clock, inbox = ManualClock(), Inbox()
    pacer = Pacer(inbox, clock, 2.0)
    clock.advance(60.0)
    pacer.landed(flight(SlowTokens(), 0.0, over_prompt(512)))
    alike, larger = (flight(SlowTokens(), clock.now(), over_prompt(size)) for size in (500, 513))
    request = greedy("long", [1] * 1024, 1)
    later = ScheduledStep(prefills=(PrefillSegment(request, 512, 1024),))
    clock.advance(60.0)
    assert pacer.await_landing(alike), "it ends now by all that is known"
    assert not pacer.hold_launch(alike)
    inbox.wake()
    assert not pacer.await_landing(larger), "of this size nothing is known"
    assert not pacer.await_landing(flight(SlowTokens(), 60.0, later)), "it attends to the part before it as well"


def test_a_step_that_ends_before_it_is_expected_is_noticed() -> None:
    clock = ManualClock()
    pacer = Pacer(Inbox(), clock, None)
    clock.advance(60.0)
    pacer.landed(flight(SlowTokens(), 0.0, over_prompt(512)))
    tokens = SlowTokens()
    timer = threading.Timer(0.02, tokens.ended.set)
    timer.start()
    assert pacer.await_landing(flight(tokens, clock.now(), over_prompt(512)))
    assert tokens.ended.is_set()
    timer.join()


def test_a_launch_is_held_until_shortly_before_the_end() -> None:
    pacer, inbox, clock = paced(2.0, decode_s=60.0)
    running = flight(SlowTokens(), clock.now())
    inbox.wake()
    assert pacer.hold_launch(running)
    clock.advance(57.9)
    assert pacer.hold_launch(running)
    clock.advance(0.2)
    assert not pacer.hold_launch(running)


def test_a_launch_is_not_held_without_a_lead_or_behind_a_step_that_has_ended() -> None:
    pacer, inbox, clock = paced(None, decode_s=60.0)
    inbox.wake()
    assert not pacer.hold_launch(flight(SlowTokens(), clock.now()))
    pacer, inbox, clock = paced(2.0, decode_s=60.0)
    inbox.wake()
    ended = SlowTokens()
    ended.ended.set()
    assert not pacer.hold_launch(flight(ended, clock.now()))


def test_an_inbox_waits_no_longer_than_it_is_told() -> None:
    inbox = Inbox()
    started = time.monotonic()
    assert not inbox.wait(0.01)
    assert time.monotonic() - started >= 0.009
    inbox.wake()
    assert inbox.wait(60.0)


# ---- in the engine


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    torch.set_num_threads(1)
    return make_harness(make_tiny_llama(tmp_path / "model"), overlap=True, launch_lead_s=0.001)


def slow_steps(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> list[SlowTokens]:
    """From now on every launched step runs until its SlowTokens, appended to the result, are told that it ended."""
    launched: list[SlowTokens] = []
    launch = harness.engine._runner.launch

    def slow(*arguments: Any) -> LaunchedStep:
        step = launch(*arguments)
        launched.append(SlowTokens(step.tokens.wait()))
        return LaunchedStep(launched[-1], step.logprobs)

    monkeypatch.setattr(harness.engine._runner, "launch", slow)
    return launched


def test_a_reservation_is_answered_while_a_step_runs(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = slow_steps(harness, monkeypatch)
    harness.add(greedy("long", random_prompt(8), 30))
    harness.turn()
    answers: list[tuple[object, int]] = []

    def reply(answer: Reservation | Refusal) -> None:
        answers.append((answer, sum(tokens.ended.is_set() for tokens in launched)))
        for tokens in launched:
            tokens.ended.set()

    timer = threading.Timer(0.05, harness.engine.post, [Reserve("lease", random_prompt(20), 24, reply)])
    timer.start()
    while not answers:
        assert harness.turn()
    timer.join()
    assert isinstance(answers[0][0], Reservation)
    assert answers[0][1] == 0


def test_an_admission_joins_the_step_after_the_running_one(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the launch is held; launched at once, that step would have left without it."""
    prompt = random_prompt(20)
    harness.add(greedy("long", random_prompt(8), 30))
    for _ in range(3):
        harness.turn()
    launched = slow_steps(harness, monkeypatch)
    harness.engine.post(Reserve("lease", prompt, 24, lambda _: None))
    harness.turn()
    assert len(launched) == len(harness.engine._flights) == 1
    harness.engine._pacer._seconds[0] = deque([60.0])
    request = greedy("late", prompt, 4)
    timer = threading.Timer(0.02, harness.engine.post, [Admission("lease", request, 7)])
    timer.start()
    harness.turn()
    assert len(launched) == 1
    launched[0].ended.set()
    harness.turn()
    timer.join()
    assert len(launched) == 2
    assert request in harness.engine._flights[-1].step.decodes


def test_news_while_a_step_hangs_are_no_progress(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a worker whose device hangs would look well as long as somebody talks to it."""
    launched = slow_steps(harness, monkeypatch)
    monkeypatch.setattr(SlowTokens, "is_ready", lambda _: harness.engine.wake())
    harness.engine._idle = False  # as on its thread
    harness.add(greedy("long", random_prompt(8), 30))
    harness.turn()
    harness.turn()
    assert len(launched) == 2
    for seconds in (1, 2, 3):
        harness.clock.advance(1.0)
        assert harness.turn()
        assert harness.engine.stats().progress_age == seconds
    monkeypatch.setattr(SlowTokens, "is_ready", lambda _: True)
    for tokens in launched:
        tokens.ended.set()
    harness.turn()
    assert harness.engine.stats().progress_age == 0
