"""An engine that cannot go on says so and ends, instead of standing still."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.common.clock import ManualClock
from baton.engine.loop import MAX_FAILURES_IN_A_ROW, Engine
from baton.engine.ports import Abort, AddRequest
from tests.support.engine_harness import greedy, random_prompt
from tests.support.tiny_model import make_tiny_llama
from tests.unit.engine.test_engine_thread import TIMEOUT_S, WaitingPorts, make_engine


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path, seed=3, std=0.2)


def _raise(error: Exception) -> object:
    raise error


def _device_fault(engine: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step goes wrong, and the device answers nothing any more."""
    monkeypatch.setattr(engine._runner, "launch", lambda *_: _raise(RuntimeError("illegal access")))  # type: ignore[attr-defined]
    monkeypatch.setattr(engine._runner, "settle", lambda: _raise(RuntimeError("the device is lost")))  # type: ignore[attr-defined]


def _defect(engine: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_snapshot", lambda: _raise(RuntimeError("the device is lost")))


@pytest.mark.parametrize("fault", [_device_fault, _defect])
@pytest.mark.parametrize("queued", [False, True])
def test_it_is_told_once_and_the_thread_ends(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, fault: object, queued: bool
) -> None:
    ports = WaitingPorts()
    engine = make_engine(model_dir, ports, ManualClock())
    engine.start()
    engine.post(AddRequest(greedy("before", random_prompt(20), 3)))
    ports.wait_for("before")
    fault(engine, monkeypatch)  # type: ignore[operator]
    engine.post(AddRequest(greedy("a", random_prompt(20), 30)))
    if queued:
        engine.post(AddRequest(greedy("b", random_prompt(20), 30)))
    engine._thread.join(TIMEOUT_S)
    assert not engine._thread.is_alive()
    assert len(ports.lost) == 1
    assert "the device is lost" in ports.lost[0]
    engine.post(Abort("a"))
    engine.stop()
    assert len(ports.lost) == 1


def _post_failing(engine: Engine, ports: WaitingPorts, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests one after the other whose step finds no memory."""
    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "launch", lambda *_: _raise(torch.OutOfMemoryError("no room")))
        for _ in range(count):
            known = len(ports.failures)
            engine.post(AddRequest(greedy(f"bad {known}", random_prompt(20), 30)))
            with ports.finished:
                assert ports.finished.wait_for(lambda known=known: len(ports.failures) > known, TIMEOUT_S)  # type: ignore[misc]


def test_it_ends_when_no_step_goes_well_any_more(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does starts the count again."""
    ports = WaitingPorts()
    engine = make_engine(model_dir, ports, ManualClock())
    engine.start()
    _post_failing(engine, ports, MAX_FAILURES_IN_A_ROW - 1, monkeypatch)
    engine.post(AddRequest(greedy("good", random_prompt(20), 3)))
    ports.wait_for("good")
    _post_failing(engine, ports, MAX_FAILURES_IN_A_ROW - 1, monkeypatch)
    assert not ports.lost
    monkeypatch.setattr(engine._runner, "launch", lambda *_: _raise(torch.OutOfMemoryError("no room")))
    engine.post(AddRequest(greedy("last", random_prompt(20), 3)))
    engine._thread.join(TIMEOUT_S)
    assert ports.lost == [f"RuntimeError('{MAX_FAILURES_IN_A_ROW} steps in a row went wrong')"]
    engine.stop()


def test_an_end_that_was_asked_for_is_no_loss(model_dir: Path) -> None:
    ports = WaitingPorts()
    engine = make_engine(model_dir, ports, ManualClock())
    engine.start()
    engine.stop()
    assert not ports.lost


def test_a_step_that_goes_wrong_on_a_device_that_works_is_no_loss(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, for example."""
    ports = WaitingPorts()
    engine = make_engine(model_dir, ports, ManualClock())
    engine.start()
    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "launch", lambda *_: _raise(torch.OutOfMemoryError("no room")))
        engine.post(AddRequest(greedy("a", random_prompt(20), 30)))
        with ports.finished:
            assert ports.finished.wait_for(lambda: bool(ports.failures), TIMEOUT_S)
    engine.post(AddRequest(greedy("b", random_prompt(20), 3)))
    ports.wait_for("b")
    engine.stop()
    assert [failure.request_id for failure in ports.failures] == ["a"]
    assert not ports.lost
