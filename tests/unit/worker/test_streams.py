"""Outboxes, the silence watch and the end of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from baton.worker.streams import Outbox, SilenceWatch, run_until_first


def writer_to(written: list[int]) -> Callable[[int], asyncio.Future[None]]:
    def write(frame: int) -> asyncio.Future[None]:
        written.append(frame)
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    return write


async def test_frames_leave_in_order_and_the_queue_is_emptied_before_the_end() -> None:
    written: list[int] = []
    outbox = Outbox[int]()
    outbox.put(1)
    writing = asyncio.create_task(outbox.write_to(writer_to(written)))
    await asyncio.sleep(0)
    outbox.put(2)
    outbox.put(3)
    outbox.end("first reason")
    outbox.end("second reason")
    outbox.put(4)
    assert await writing == "first reason"
    assert written == [1, 2, 3]


async def test_a_reader_that_never_reads_ends_the_stream() -> None:
    outbox = Outbox[int](limit=2)
    for frame in range(3):
        outbox.put(frame)
    written: list[int] = []
    assert "2 frames unread" in await outbox.write_to(writer_to(written))
    assert written == [0, 1]


async def test_silence_is_noticed_and_speech_puts_it_off() -> None:
    loop = asyncio.get_running_loop()
    watch = SilenceWatch(0.2)
    started = loop.time()
    watching = asyncio.create_task(watch.run())
    for _ in range(10):
        await asyncio.sleep(0.04)
        watch.heard()
    spoken_until = loop.time()
    assert not watching.done()
    assert "silent" in await asyncio.wait_for(watching, 30)
    assert loop.time() - spoken_until >= 0.17
    assert spoken_until - started > 0.2


async def test_a_pause_of_our_own_is_not_the_peers_silence() -> None:
    """The loop stands still for longer than the timeout while the peer's frames wait to be read."""
    watch = SilenceWatch(0.4)
    watching = asyncio.create_task(watch.run())
    await asyncio.sleep(0.01)
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.6
    while loop.time() < until:
        pass
    await asyncio.sleep(0)
    assert not watching.done()
    watch.heard()
    await asyncio.sleep(0.2)
    assert not watching.done()
    watching.cancel()


def test_a_timeout_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        SilenceWatch(0.0)


async def test_the_first_loop_to_end_ends_the_others() -> None:
    ended = []

    async def forever() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("forever")
        return "never"

    async def brief() -> str:
        return "the reason"

    assert await run_until_first("test", {"a": forever(), "b": brief()}) == "the reason"
    assert ended == ["forever"]
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("test:")]


async def test_a_fault_of_one_loop_reaches_the_caller() -> None:
    async def faulty() -> str:
        raise ConnectionError("broken")

    with pytest.raises(ConnectionError, match="broken"):
        await run_until_first("test", {"a": asyncio.sleep(60, "never"), "b": faulty()})
