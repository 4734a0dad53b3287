"""Slots, the queue before them, and the line of requests that wait for a worker."""

from __future__ import annotations

import asyncio

import pytest

from baton.common.errors import Overloaded
from router.admission import Admission, WaitingLine


async def test_slots_are_handed_on_in_order_of_arrival() -> None:
    admission = Admission(1, 5)
    await admission.acquire()
    got: list[int] = []

    async def take(number: int) -> None:
        await admission.acquire()
        got.append(number)
        admission.release(0.1)

    tasks = [asyncio.create_task(take(number)) for number in range(3)]
    await asyncio.sleep(0)
    assert admission.queued == 3
    admission.release(0.1)
    await asyncio.gather(*tasks)
    assert got == [0, 1, 2]
    assert (admission.running, admission.queued) == (0, 0)


async def test_a_full_queue_refuses_at_once_with_a_time_to_wait() -> None:
    admission = Admission(1, 0)
    await admission.acquire()
    with pytest.raises(Overloaded) as error:
        await admission.acquire()
    assert error.value.retry_after_s >= 1


async def test_parked_requests_count_as_queued() -> None:
    admission = Admission(8, 2)
    admission.parked = 2
    with pytest.raises(Overloaded):
        admission.check_queue()


async def test_a_cancelled_waiter_costs_no_slot() -> None:
    admission = Admission(1, 5)
    await admission.acquire()
    waiters = [asyncio.create_task(admission.acquire()) for _ in range(2)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    admission.release(0.1)
    await waiters[1]
    assert admission.queued == 0
    admission.release(0.1)
    assert (admission.running, admission.queued) == (0, 0)


async def test_waiters_that_left_are_not_kept_until_a_slot_is_free() -> None:
    admission = Admission(1, 5)
    await admission.acquire()
    for _ in range(100):
        waiter = asyncio.create_task(admission.acquire())
        await asyncio.sleep(0)
        assert admission.queued == 1
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
    assert admission.queued == len(admission._queue) == 0


async def test_a_waiter_cancelled_after_its_turn_came_hands_the_slot_on() -> None:
    admission = Admission(1, 5)
    await admission.acquire()
    waiters = [asyncio.create_task(admission.acquire()) for _ in range(2)]
    await asyncio.sleep(0)
    admission.release(0.1)
    waiters[0].cancel()
    await waiters[1]
    assert admission.running == 1


async def test_only_the_oldest_in_line_is_woken_and_wakes_the_next_when_it_leaves() -> None:
    line = WaitingLine()
    for ticket in (5, 3, 9):
        line.join(ticket)
    order: list[int] = []

    async def wait(ticket: int) -> None:
        await line.wait(ticket)
        order.append(ticket)
        line.leave(ticket)

    tasks = [asyncio.create_task(wait(ticket)) for ticket in (5, 3, 9)]
    await asyncio.sleep(0)
    line.wake()
    await asyncio.gather(*tasks)
    assert order == [3, 5, 9]


async def test_younger_requests_are_blocked_by_older_ones_only() -> None:
    line = WaitingLine()
    line.join(4)
    assert line.is_blocked(5)
    assert not line.is_blocked(4)
    assert not line.is_blocked(3)
    line.leave(4)
    line.leave(4)
    assert not line.is_blocked(5)


async def test_who_stands_aside_holds_up_nobody_until_a_worker_comes() -> None:
    line = WaitingLine()
    for ticket in (1, 2):
        line.join(ticket)
    line.stand_aside(1)
    line.stand_aside(1)
    assert not line.is_blocked(2)
    await line.wait(2)
    line.wake_all()
    assert line.is_blocked(2)
    await asyncio.gather(line.wait(1), line.wait(2))
    line.stand_aside(1)
    line.leave(1)
    line.leave(2)
    line.wake_all()
    assert not line.is_blocked(3)
