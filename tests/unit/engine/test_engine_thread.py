"""The engine on its own thread: it sleeps when idle, wakes on a command, ends when told."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from baton.common.clock import ManualClock
from baton.common.config import EngineConfig, TransferConfig
from baton.engine.build import build_engine
from baton.engine.loop import Engine
from baton.engine.ports import AddRequest, Admission, StepReport
from tests.support.engine_harness import RecordingPorts, greedy, make_harness, random_prompt
from tests.support.tiny_model import make_tiny_llama

TIMEOUT_S = 60.0


class WaitingPorts(RecordingPorts):
    """Lets a test wait for a request's end, and hold the engine at the start of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.finished = threading.Condition()
        self.hold: threading.Event | None = None
        self.held = threading.Event()
        self.threads: set[str] = set()
        self.asked = 0

    def on_step(self, report: StepReport) -> None:
        self.threads.add(threading.current_thread().name)
        with self.finished:
            super().on_step(report)
            self.finished.notify_all()

    def ready_to_admit(self) -> Sequence[Admission]:
        with self.finished:
            self.asked += 1
            self.finished.notify_all()
        if self.hold is not None:
            self.held.set()
            assert self.hold.wait(TIMEOUT_S)
        return super().ready_to_admit()

    def wait_for(self, *names: str) -> None:
        with self.finished:
            assert self.finished.wait_for(lambda: set(names) <= set(self.finish_reasons), TIMEOUT_S)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path, seed=3, std=0.2)


def make_engine(model_dir: Path, ports: WaitingPorts, clock: ManualClock) -> Engine:
    config = EngineConfig(num_blocks=64, max_model_len=256)
    return build_engine(config, TransferConfig(), model_dir, torch.device("cpu"), ports, clock)


def test_commands_from_many_threads(model_dir: Path) -> None:
    ports = WaitingPorts()
    engine = make_engine(model_dir, ports, ManualClock())
    engine.start()
    try:
        names = [f"r{n}" for n in range(12)]
        posters = [
            threading.Thread(target=engine.post, args=(AddRequest(greedy(name, random_prompt(20, seed=n), 10)),))
            for n, name in enumerate(names)
        ]
        for poster in posters:
            poster.start()
        for poster in posters:
            poster.join()
        ports.wait_for(*names)
        # Idle now: a later command wakes it again.
        engine.post(AddRequest(greedy("later", random_prompt(20), 10)))
        ports.wait_for("later")
    finally:
        engine.stop()
    assert ports.threads == {"engine"}
    alone = make_harness(model_dir).generate(greedy("r0", random_prompt(20, seed=0), 10))["r0"]
    assert ports.tokens["r0"] == alone
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]


def test_wake_makes_an_idle_engine_ask_for_admissions(model_dir: Path) -> None:
    ports = WaitingPorts()
    engine = make_engine(model_dir, ports, ManualClock())
    engine.start()
    try:
        engine.wake()
        with ports.finished:
            assert ports.finished.wait_for(lambda: ports.asked == 1, TIMEOUT_S)
    finally:
        engine.stop()
    assert ports.asked == 1, "an idle engine must sleep"


def test_progress_age_grows_only_while_a_step_is_stuck(model_dir: Path) -> None:
    ports, clock = WaitingPorts(), ManualClock()
    engine = make_engine(model_dir, ports, clock)
    engine.start()
    try:
        clock.advance(100)
        assert engine.stats().progress_age == 0
        ports.hold = threading.Event()
        engine.post(AddRequest(greedy("a", random_prompt(20), 4)))
        assert ports.held.wait(TIMEOUT_S)
        clock.advance(7)
        assert engine.stats().progress_age == 7
        hold, ports.hold = ports.hold, None
        hold.set()
        ports.wait_for("a")
    finally:
        engine.stop()
    assert engine.stats().steps == 4


def test_stop_in_the_middle_of_work(model_dir: Path) -> None:
    ports = WaitingPorts()
    engine = make_engine(model_dir, ports, ManualClock())
    ports.hold = threading.Event()
    engine.start()
    engine.post(AddRequest(greedy("a", random_prompt(20), 200)))
    assert ports.held.wait(TIMEOUT_S)
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    hold, ports.hold = ports.hold, None
    hold.set()
    stopper.join(TIMEOUT_S)
    assert not stopper.is_alive()
    assert "a" not in ports.finish_reasons


def test_an_engine_that_never_started_can_be_stopped(model_dir: Path) -> None:
    make_engine(model_dir, WaitingPorts(), ManualClock()).stop()
