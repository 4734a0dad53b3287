"""Full workers and full queues: who waits, who is refused, and when."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from grpc_status import rpc_status

from protos import worker_pb2 as wpb
from tests.support.fake_worker import FakeWorker, answer, emit, pair_of_answers
from tests.unit.router.asking import TOKENS, ask, kind_and_code, only_connect, request, token_ids, tokens_of
from tests.unit.router.conftest import Served, serving


def refuse_first(count: int) -> Any:
    """Refuse the first `count` reservations as busy, then behave."""
    left = [count]

    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.HasField("open") and left[0] > 0:
            left[0] -= 1
            busy = wpb.Refused(key=frame.open.key, code="busy", message="full", retry_after_s=0.01)
            worker.say(refused=busy)
        else:
            answer(worker, frame)

    return script


async def test_a_full_worker_makes_the_request_wait_in_the_router(workers: list[FakeWorker]) -> None:
    """More refusals than max_attempts: they cost no attempt, since nothing was tried."""
    prefill, decode = pair_of_answers("p0", "d0")
    decode.script = refuse_first(5)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote", "max_attempts": 2}) as served:
        await served.attach(*workers)
        response = await ask(served)
        assert token_ids(response) == TOKENS
        assert response.headers["x-baton-path"].startswith("remote")
        assert len(decode.received("open")) == 6


async def test_when_nobody_may_wait_a_full_worker_is_a_429_with_retry_after(workers: list[FakeWorker]) -> None:
    prefill, decode = pair_of_answers("p0", "d0")
    decode.script = refuse_first(2)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote", "max_queued": 0}) as served:
        await served.attach(*workers)
        response = await ask(served)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert kind_and_code(response) == ("rate_limit_error", "rate_limit_exceeded")
        await served.until(lambda: served.router.registry.snapshot().workers[0].has_room)
        call = served.grpc.Generate(request())
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await tokens_of(call)
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        status = await rpc_status.aio.from_call(call)  # type: ignore[attr-defined]
        retry = RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() > 0


async def test_when_nobody_may_wait_a_full_prefill_queue_is_a_429(workers: list[FakeWorker]) -> None:
    timing = wpb.StepTiming(base_s=0.0, per_prefill_token_s=1.0, samples=5)
    workers.extend((FakeWorker("p0", "prefill", only_connect, timing=timing), FakeWorker("d0", "decode", answer)))
    async with serving(router={"policy": "remote", "max_queued": 0}) as served:
        await served.attach(*workers)
        await served.until(lambda: all(w.step for w in served.router.registry.snapshot().workers if not w.can_decode))
        first = ask(served)
        await workers[0].next_frame("prefill")
        assert (await ask(served)).status_code == 429
        first.cancel()


async def test_a_busy_worker_is_not_asked_again_for_a_while(workers: list[FakeWorker]) -> None:
    prefill, decode = pair_of_answers("p0", "d1")

    def refuse(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.HasField("open"):
            busy = wpb.Refused(key=frame.open.key, code="busy", message="full", retry_after_s=60.0)
            worker.say(refused=busy)

    full = FakeWorker("d0", "decode", refuse)
    workers.extend((prefill, decode, full))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        for _ in range(4):
            assert token_ids(await ask(served)) == TOKENS
        assert len(full.received("open")) == 1


async def test_beyond_the_bounds_requests_are_refused_and_the_others_served_in_order(
    workers: list[FakeWorker],
) -> None:
    workers.append(FakeWorker("d0"))
    async with serving(router={"max_concurrent": 1, "max_queued": 1}) as served:
        await served.attach(*workers)
        first = ask(served)
        command = await workers[0].next_frame("generate")
        second = ask(served)
        await served.until(lambda: served.router.dispatcher.admission.queued == 1)
        refused = await ask(served)
        assert refused.status_code == 429
        assert len(workers[0].received("generate")) == 1
        workers[0].script = answer
        emit(workers[0], command.key, command.spec, 0, 8)
        assert token_ids(await first) == token_ids(await second) == TOKENS


async def test_a_lease_waits_until_the_prefill_worker_has_little_queued(workers: list[FakeWorker]) -> None:
    """One second per token: the second request may be opened only when the first has left the prefill queue."""
    timing = wpb.StepTiming(base_s=0.0, per_prefill_token_s=1.0, samples=5)
    decode = FakeWorker("d0", "decode", answer)
    prefill = FakeWorker("p0", "prefill", only_connect, timing=timing)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote", "prefill_queue_s": 0.5}) as served:
        await served.attach(*workers)
        await served.until(lambda: all(w.step for w in served.router.registry.snapshot().workers if not w.can_decode))
        first, second = ask(served), ask(served)
        await served.until(lambda: served.router.dispatcher.admission.queued == 1)
        command = await prefill.next_frame("prefill")
        assert len(decode.received("open")) == 1
        emit(prefill, command.key, command.spec, 0, 1)
        emit(decode, command.key, command.spec, 1, 8)
        again = await prefill.next_frame("prefill", 2)
        emit(prefill, again.key, again.spec, 0, 1)
        emit(decode, again.key, again.spec, 1, 8)
        assert token_ids(await first) == token_ids(await second) == TOKENS


async def test_without_any_worker_the_answer_is_503(served: Served) -> None:
    response = await ask(served)
    assert response.status_code == 503
    assert kind_and_code(response) == ("server_error", "service_unavailable")
    assert response.json()["error"]["message"] == "no worker that could hold this request is attached"


async def test_a_request_outlives_a_moment_without_members(workers: list[FakeWorker], served: Served) -> None:
    """The only worker dies, the supervisor takes its address away, and later names the new one."""

    def some_tokens(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.HasField("generate"):
            emit(worker, frame.generate.key, frame.generate.spec, 0, 3)

    workers.append(FakeWorker("first", script=some_tokens))
    await served.attach(*workers)
    answering = ask(served)
    await workers[0].next_frame("generate")
    served.router.registry.set_members([])
    await served.until(lambda: not served.router.registry.sessions)
    workers.append(FakeWorker("second", script=answer))
    await served.attach(workers[1])
    assert token_ids(await answering) == TOKENS
