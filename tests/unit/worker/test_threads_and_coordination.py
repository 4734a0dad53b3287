"""From threads to the loop, and from events to actions."""

from __future__ import annotations

import asyncio
import threading

import pytest

from baton.worker.coordinator import Coordinator
from baton.worker.faults import Faults
from baton.worker.mailbox import Mailbox
from baton.worker.tasks import Tasks
from baton.worker.threads import run_in_thread


async def test_mail_arrives_in_order_and_on_the_loop() -> None:
    got: list[tuple[int, int]] = []
    arrived = asyncio.Event()

    def handle(item: int) -> None:
        got.append((item, threading.get_ident()))
        if item == 999:
            arrived.set()

    mailbox = Mailbox[int](asyncio.get_running_loop(), handle, Faults())

    def send() -> None:
        for item in range(1000):
            mailbox.post(item)

    sender = threading.Thread(target=send)
    sender.start()
    await asyncio.wait_for(arrived.wait(), 30)
    sender.join()
    assert got == [(item, threading.get_ident()) for item in range(1000)]


async def test_the_loop_is_woken_once_for_all_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    wakes = []
    original = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: wakes.append(call) or original(call))  # type: ignore[func-returns-value]
    got: list[int] = []
    mailbox = Mailbox[int](loop, got.append, Faults())
    for item in range(5):
        mailbox.post(item)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    mailbox.post(5)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert got == [0, 1, 2, 3, 4, 5]
    assert len(wakes) == 2


async def test_a_fault_is_counted_and_the_rest_still_arrives() -> None:
    got: list[int] = []
    faults = Faults()

    def handle(item: int) -> None:
        if item == 1:
            raise RuntimeError("a defect")
        got.append(item)

    mailbox = Mailbox[int](asyncio.get_running_loop(), handle, faults)
    for item in range(3):
        mailbox.post(item)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert got == [0, 2]
    assert faults.count == 1


async def test_a_closed_mailbox_is_silent() -> None:
    got: list[int] = []
    mailbox = Mailbox[int](asyncio.get_running_loop(), got.append, Faults())
    mailbox.post(1)
    mailbox.close()
    mailbox.post(2)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert got == []


def test_events_that_actions_cause_come_after_the_other_actions() -> None:
    log: list[str] = []

    def step(state: int, event: str) -> tuple[int, tuple[str, ...]]:
        return state + 1, tuple(f"{event}{index}" for index in range(2)) if len(event) < 3 else ()

    def execute(action: str) -> None:
        log.append(action)
        if action == "a0":
            coordinator.feed("b")

    coordinator: Coordinator[int, str, str] = Coordinator(0, step, execute, Faults())
    coordinator.feed("a")
    assert log == ["a0", "a1", "b0", "b1"]
    assert coordinator.state == 2


def test_an_action_that_fails_keeps_no_other_from_running() -> None:
    done: list[int] = []
    faults = Faults()

    def execute(action: int) -> None:
        if action == 0:
            raise KeyError("a defect")
        done.append(action)

    coordinator: Coordinator[int, int, int] = Coordinator(0, lambda state, _event: (state, (0, 1)), execute, faults)
    coordinator.feed(7)
    coordinator.feed(8)
    assert done == [1, 1]
    assert faults.count == 2


async def test_a_thread_gives_its_result_or_its_error() -> None:
    assert await run_in_thread(threading.current_thread, "test thread") is not threading.current_thread()

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await run_in_thread(fail, "test thread")


async def test_tasks_end_on_cancel_and_faults_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    tasks = Tasks(faults)
    waiting = tasks.spawn(asyncio.Event().wait(), "waits")

    async def fail() -> None:
        raise RuntimeError("a defect")

    failing = tasks.spawn(fail(), "fails")
    await asyncio.wait([failing])
    await asyncio.sleep(0)
    assert "background task fails failed" in caplog.text
    await tasks.cancel_all()
    assert waiting.cancelled()
    assert faults.count == 1
