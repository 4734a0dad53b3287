"""The thread that starts transfers: what it runs first, and that nothing submitted in time is left out."""

from __future__ import annotations

import threading

from kv_transfer.jobs import JobThread
from tests.transfer.io_support import WAIT_S


def test_urgent_jobs_overtake_others_and_each_kind_keeps_its_order() -> None:
    thread, entered, allowed = JobThread("test"), threading.Event(), threading.Event()
    ran: list[str] = []

    def hold() -> None:
        entered.set()
        assert allowed.wait(WAIT_S)

    thread.submit(hold)
    assert entered.wait(WAIT_S)
    for name in ("a", "B", "c", "D"):
        thread.submit(lambda name=name: ran.append(name), is_urgent=name.isupper())  # type: ignore[misc]
    allowed.set()
    assert thread.close(WAIT_S)
    assert ran == ["B", "D", "a", "c"]


def test_what_is_submitted_after_close_never_runs() -> None:
    thread, ran = JobThread("test"), threading.Event()
    assert thread.close(WAIT_S)
    thread.submit(ran.set)
    assert not ran.wait(0.05)


def test_a_job_that_does_not_end_is_told_by_close() -> None:
    thread, allowed = JobThread("test"), threading.Event()
    thread.submit(lambda: assert_wait(allowed))
    assert not thread.close(0.05)
    allowed.set()
    assert thread.close(WAIT_S)


def assert_wait(event: threading.Event) -> None:
    assert event.wait(WAIT_S)
