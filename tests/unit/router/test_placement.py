"""Requests for which no worker is there: how long they wait, and that they hold up nobody."""

from __future__ import annotations

import asyncio

import pytest

from protos import worker_pb2 as wpb
from router import placement
from tests.support.fake_worker import FakeWorker, answer, pair_of_answers
from tests.unit.router.asking import TOKENS, ask, token_ids
from tests.unit.router.conftest import Served, serving


def refuse(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
    busy = wpb.Refused(key=frame.generate.key, code="busy", message="full", retry_after_s=60.0)
    worker.say(refused=busy)


async def test_when_the_last_worker_is_lost_all_that_wait_for_room_wait_for_a_worker_from_then_on(
    workers: list[FakeWorker], served: Served
) -> None:
    workers.append(FakeWorker("d0", script=refuse))
    await served.attach(*workers)
    line = served.router.dispatcher.placement._line
    asking = [ask(served) for _ in range(3)]
    await served.until(lambda: len(line._tickets) == 3)
    await workers[0].kill()
    await served.until(lambda: not line._tickets)
    assert len(line._wakeups) == 3
    workers.append(FakeWorker("d1", script=answer))
    await served.attach(workers[1])
    assert [token_ids(response) for response in await asyncio.gather(*asking)] == [TOKENS] * 3


async def test_who_finds_no_worker_for_long_enough_is_told(
    workers: list[FakeWorker], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "WORKER_WAIT_S", 0.1)
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    asking = ask(served)
    await workers[0].next_frame("generate")
    await workers[0].kill()
    response = await asking
    assert (response.status_code, response.json()["error"]["code"]) == (503, "service_unavailable")


async def test_an_older_request_that_fits_no_worker_holds_up_no_hand_over(workers: list[FakeWorker]) -> None:
    workers.extend((*pair_of_answers("p0", "d0"), FakeWorker("large", max_model_len=1000)))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        older = asyncio.create_task(served.complete(prompt=[1] * 600))
        await workers[2].next_frame("generate")
        await workers[2].kill()
        await served.until(lambda: served.router.dispatcher.admission.parked == 1)
        response = await ask(served)
        assert token_ids(response) == TOKENS
        assert response.headers["x-baton-path"].startswith("remote")
        older.cancel()
