"""An engine that cannot go on says so and ends, instead of standing still."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.common.clock import ManualClock
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
