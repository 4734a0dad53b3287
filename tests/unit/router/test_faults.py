"""Lost workers, refusals, failed hand-overs, fencing and cancelling: no token is repeated, skipped or reordered, and no
worker keeps a request that is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import httpx
import pytest
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from grpc_status import rpc_status

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.completions import Completions
from router.reader.pool import RequestReader
from tests.support.fake_worker import WAIT_S, FakeWorker, answer, emit, expected_tokens, pair_of_answers
from tests.unit.router.conftest import MODEL, Served, serving

TOKENS = expected_tokens(3, 8)


def request(max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=MODEL,
        token_ids=pb.TokenIds(ids=[1, 2, 3]),
        sampling=pb.SamplingParams(max_tokens=max_tokens),
        return_token_ids=True,
        **fields,
    )


async def responses_of(call: Any) -> list[pb.GenerateResponse]:
    """All that are left, read one by one."""
    responses = []
    while isinstance(response := await call.read(), pb.GenerateResponse):
        responses.append(response)
    return responses


async def tokens_of(call: Any) -> list[int]:
    return [token for response in await responses_of(call) for token in response.token_ids]


async def next_token_ids(call: Any) -> list[int]:
    response = await call.read()
    return list(response.token_ids)


def ask(served: Served) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(served.complete(max_tokens=8, return_token_ids=True))


def kind_and_code(response: httpx.Response) -> tuple[str, str]:
    """Of an error, as OpenAI's API has them."""
    error = response.json()["error"]
    assert error["param"] is None
    return error["type"], error["code"]


def token_ids(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    ids = response.json()["choices"][0]["token_ids"]
    assert isinstance(ids, list)
    return ids


# ---- fencing


async def test_repeats_and_other_attempts_never_reach_the_client(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    answering = ask(served)
    key = (await workers[0].next_frame("generate")).key
    stale = wpb.AttemptKey(request_id=key.request_id, attempt=key.attempt + 1)
    workers[0].say_tokens(key, 0, TOKENS[:3])
    workers[0].say_tokens(stale, 3, [90, 91])
    workers[0].say_tokens(key, 1, [92, 93])
    workers[0].say_tokens(key, 2, [94, TOKENS[3]])
    workers[0].say_tokens(key, 5, TOKENS[5:], "length")
    workers[0].say_tokens(key, 4, TOKENS[4:5])
    assert token_ids(await answering) == TOKENS
    assert served.router.metrics.registry.get_sample_value("baton_fenced_frames_total") == 1


async def test_decode_may_overtake_the_first_token(workers: list[FakeWorker]) -> None:
    prefill, decode = FakeWorker("p0", "prefill", answer), FakeWorker("d0", "decode", answer)
    workers.extend((prefill, decode))
    prefill.script = lambda worker, frame: answer(worker, frame) if frame.HasField("connect_peer") else None
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        call = served.grpc.Generate(request())
        command = await prefill.next_frame("prefill")
        emit(decode, command.key, command.spec, 1, 3)
        # The frames of the two workers are not ordered: make sure that decode's are there first.
        await served.until(lambda: _num_held(served) == 2)
        emit(prefill, command.key, command.spec, 0, 1)
        first = await next_token_ids(call)
        emit(decode, command.key, command.spec, 3, 8)
        assert first + await tokens_of(call) == TOKENS


def _num_held(served: Served) -> int:
    generations = served.router.dispatcher._generations.values()
    return sum(g._attempt._fence.num_waiting for g in generations if g._attempt is not None)


async def test_a_worker_that_says_too_much_is_cut_at_max_tokens(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    answering = ask(served)
    key = (await workers[0].next_frame("generate")).key
    workers[0].say_tokens(key, 0, [*TOKENS, 95, 96])
    response = await answering
    assert token_ids(response) == TOKENS
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert (await workers[0].next_frame("cancel")).key == key


# ---- lost workers


async def test_a_lost_worker_is_replaced_and_the_stream_goes_on(workers: list[FakeWorker], served: Served) -> None:
    workers.extend((FakeWorker("d0"), FakeWorker("d1")))
    await served.attach(*workers)
    call = served.grpc.Generate(request())
    await served.until(lambda: any(worker.received("generate") for worker in workers))
    first, other = sorted(workers, key=lambda worker: -len(worker.received("generate")))
    command = first.received("generate")[0]
    emit(first, command.key, command.spec, 0, 3)
    seen: list[int] = []
    while len(seen) < 3:
        seen += await next_token_ids(call)
    other.script = answer
    await first.kill()
    again = await other.next_frame("generate")
    assert list(again.spec.token_ids) == [1, 2, 3, *TOKENS[:3]]
    assert (again.spec.num_emitted, again.spec.max_tokens) == (3, 5)
    assert again.spec.seed == command.spec.seed
    assert again.key.attempt == command.key.attempt + 1
    rest = await responses_of(call)
    assert seen + [token for response in rest for token in response.token_ids] == TOKENS
    assert rest[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=8, total_tokens=11)


async def test_a_silent_worker_is_lost_and_nothing_that_it_says_later_counts(workers: list[FakeWorker]) -> None:
    workers.extend((FakeWorker("d0"), FakeWorker("d1")))
    async with serving(router={"heartbeat_timeout_s": 0.3}) as served:
        await served.attach(*workers)
        answering = ask(served)
        await served.until(lambda: any(worker.received("generate") for worker in workers))
        silent, other = sorted(workers, key=lambda worker: -len(worker.received("generate")))
        key = silent.received("generate")[0].key
        silent.say_tokens(key, 0, TOKENS[:2])
        silent.beats = False
        again = await other.next_frame("generate")
        silent.beats = True
        silent.say_tokens(key, again.spec.num_emitted, [90, 91, 92])
        emit(other, again.key, again.spec, 0, 8)
        assert token_ids(await answering) == TOKENS
        await served.until(lambda: len(served.router.registry.sessions) == 2)


async def test_prefill_lost_before_the_first_token_is_retried_and_decode_is_told(workers: list[FakeWorker]) -> None:
    decode = FakeWorker("d0", "decode", answer)
    prefill = FakeWorker("p0", "prefill", lambda worker, frame: _only_connect(worker, frame))
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        answering = ask(served)
        command = await prefill.next_frame("prefill")
        await prefill.kill()
        assert (await decode.next_frame("cancel")).key == command.key
        assert token_ids(await answering) == TOKENS
        record = await served.record(answering.result().json()["id"])
        assert [attempt["path"] for attempt in record["attempts"]] == ["remote", "local"]
        assert sum(record["ttft_parts_us"].values()) == record["ttft_us"]


async def test_prefill_lost_after_the_first_token_is_left_to_decode(workers: list[FakeWorker]) -> None:
    decode, prefill = FakeWorker("d0", "decode", answer), FakeWorker("p0", "prefill", answer)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        call = served.grpc.Generate(request())
        assert await next_token_ids(call) == TOKENS[:1]
        command = prefill.received("prefill")[0]
        await prefill.kill()
        await served.until(lambda: len(served.router.registry.sessions) == 1)
        emit(decode, command.key, command.spec, 1, 8)
        assert await tokens_of(call) == TOKENS[1:]
        assert not decode.received("generate")


async def test_a_request_waits_for_a_worker_that_is_restarting(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    answering = ask(served)
    command = await workers[0].next_frame("generate")
    emit(workers[0], command.key, command.spec, 0, 2)
    await served.until(lambda: served.router.metrics.registry.get_sample_value("baton_generation_tokens_total") == 2)
    port = int(workers[0].address.rpartition(":")[2])
    await workers[0].kill()
    workers.append(FakeWorker("d0-again", script=answer))
    await workers[1].start(port)
    assert token_ids(await answering) == TOKENS
    assert list(workers[1].received("generate")[0].spec.token_ids) == [1, 2, 3, *TOKENS[:2]]


async def test_attempts_are_bounded_but_progress_starts_the_count_again(
    workers: list[FakeWorker], served: Served
) -> None:
    """Each attempt emits one token and fails, so five attempts are fine although three in a row would not be."""

    def one_token_then_fail(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.HasField("generate"):
            command = frame.generate
            emit(worker, command.key, command.spec, 0, 1)
            if command.spec.max_tokens > 1:
                worker.say(failed=wpb.AttemptFailed(key=command.key, code="internal", message="x", retryable=True))

    workers.append(FakeWorker("d0", script=one_token_then_fail))
    await served.attach(*workers)
    assert token_ids(await ask(served)) == TOKENS

    def always_fail(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.HasField("generate"):
            key = frame.generate.key
            worker.say(failed=wpb.AttemptFailed(key=key, code="internal", message="boom", retryable=True))

    workers[0].script = always_fail
    before = len(workers[0].received("generate"))
    response = await ask(served)
    assert response.status_code == 503
    assert "3 attempts failed, the last one with: boom" in response.json()["error"]["message"]
    assert len(workers[0].received("generate")) - before == 3


@pytest.mark.parametrize(("code", "status"), [("deadline", 504), ("internal", 503)])
async def test_a_failure_that_no_retry_mends_is_told_at_once(
    workers: list[FakeWorker], served: Served, code: str, status: int
) -> None:
    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.HasField("generate"):
            worker.say(failed=wpb.AttemptFailed(key=frame.generate.key, code=code, message="m", retryable=False))

    workers.append(FakeWorker("d0", script=script))
    await served.attach(*workers)
    assert (await ask(served)).status_code == status
    assert len(workers[0].received("generate")) == 1


async def test_an_error_after_the_first_token_is_an_event_of_the_stream(
    workers: list[FakeWorker], served: Served
) -> None:
    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.HasField("generate"):
            key = frame.generate.key
            worker.say_tokens(key, 0, TOKENS[:1])
            worker.say(failed=wpb.AttemptFailed(key=key, code="internal", message="broken", retryable=False))

    workers.append(FakeWorker("d0", script=script))
    await served.attach(*workers)
    body = {"model": MODEL, "prompt": [1, 2, 3], "stream": True}
    async with served.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        data = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert '"error"' in data[-2]
    assert "broken" in data[-2]
    assert data[-1] == "[DONE]"


@pytest.mark.parametrize("over", ["HTTP", "gRPC"])
async def test_a_defect_is_an_internal_error_that_tells_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    async def defective(*_: object) -> None:
        raise KeyError("of the router's own")

    monkeypatch.setattr(Completions, "start", defective)
    if over == "HTTP":
        response = await served.complete()
        assert response.status_code == 500
        assert kind_and_code(response) == ("server_error", "internal_error")
        assert response.json()["error"]["message"] == "internal error"
    else:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await tokens_of(served.grpc.Generate(request()))
        assert (error.value.code(), error.value.details()) == (grpc.StatusCode.INTERNAL, "internal error")


# ---- failed hand-overs


async def test_a_request_without_a_hand_over_does_not_prove_that_its_pair_works(workers: list[FakeWorker]) -> None:
    """It ends at its first token, which the prefill worker draws: nothing of it crosses the pair."""
    workers.extend(pair_of_answers("p0", "d0"))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        (pair,) = served.router.registry.pairs.all()
        pair.failures = 3
        response = await served.complete(max_tokens=1)
        assert response.headers["x-baton-path"].startswith("remote; ")
        assert pair.failures == 3
        assert (await served.complete(max_tokens=2)).status_code == 200
        assert pair.failures == 0


async def test_a_second_reservation_of_an_attempt_starts_no_second_prefill(workers: list[FakeWorker]) -> None:
    prefill, decode = FakeWorker("p0", "prefill", answer), FakeWorker("d0", "decode", answer)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        call = served.grpc.Generate(request())
        command = await prefill.next_frame("prefill")
        assert await next_token_ids(call) == TOKENS[:1]
        emit(decode, command.key, command.spec, 1, 2)
        assert await next_token_ids(call) == TOKENS[1:2]
        decode.say(reserved=wpb.Reserved(key=command.key, lease=8, generation=2))
        emit(decode, command.key, command.spec, 2, 8)
        assert await tokens_of(call) == TOKENS[2:]
        assert len(prefill.received("prefill")) == 1


def _only_connect(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
    if frame.HasField("connect_peer"):
        answer(worker, frame)


@pytest.mark.parametrize("code", ["corrupt", "peer_lost", "expired"])
async def test_a_failed_hand_over_goes_on_locally_behind_the_tokens_that_are_out(
    workers: list[FakeWorker], code: str
) -> None:
    decode, prefill = FakeWorker("d0", "decode", answer), FakeWorker("p0", "prefill", answer)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        call = served.grpc.Generate(request())
        assert await next_token_ids(call) == TOKENS[:1]
        key = prefill.received("prefill")[0].key
        decode.say(failed=wpb.AttemptFailed(key=key, code=code, message="bad block", retryable=True))
        responses = await responses_of(call)
        assert [token for response in responses for token in response.token_ids] == TOKENS[1:]
        assert (await prefill.next_frame("cancel")).key == key
        assert not [cancel for cancel in decode.received("cancel") if cancel.key == key]
        assert list(decode.received("generate")[0].spec.token_ids) == [1, 2, 3, TOKENS[0]]
        assert not served.router.registry.snapshot().connected, "the pair rests"


@pytest.mark.parametrize("code", ["no_connection", "unknown_lease"])
async def test_a_refused_prefill_frees_the_reservation_and_goes_local(workers: list[FakeWorker], code: str) -> None:
    def refuse(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        _only_connect(worker, frame)
        if frame.HasField("prefill"):
            worker.say(refused=wpb.Refused(key=frame.prefill.key, code=code, message="no"))

    decode, prefill = FakeWorker("d0", "decode", answer), FakeWorker("p0", "prefill", refuse)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        response = await ask(served)
        assert token_ids(response) == TOKENS
        assert response.headers["x-baton-path"] == f"local; local because the hand-over failed ({code})"
        assert (await decode.next_frame("cancel")).key == prefill.received("prefill")[0].key
        assert not prefill.received("cancel")


async def test_what_is_invalid_for_the_worker_is_a_client_error(workers: list[FakeWorker], served: Served) -> None:
    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.HasField("generate"):
            worker.say(refused=wpb.Refused(key=frame.generate.key, code="invalid", message="never fits"))

    workers.append(FakeWorker("d0", script=script))
    await served.attach(*workers)
    response = await ask(served)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "never fits"


# ---- no room


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
    workers.extend((FakeWorker("p0", "prefill", _only_connect, timing=timing), FakeWorker("d0", "decode", answer)))
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
    prefill = FakeWorker("p0", "prefill", _only_connect, timing=timing)
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


# ---- cancel, disconnect, deadlines


async def running_remote(served: Served, prefill: FakeWorker, decode: FakeWorker) -> tuple[Any, wpb.AttemptKey]:
    """A gRPC call whose hand-over is under way: its first token is out, decode knows it, too."""
    call = served.grpc.Generate(request(max_tokens=100))
    assert await next_token_ids(call) == TOKENS[:1]
    return call, prefill.received("prefill")[0].key


@pytest.fixture
async def remote(workers: list[FakeWorker]) -> AsyncIterator[Served]:
    workers.extend((FakeWorker("p0", "prefill", answer), FakeWorker("d0", "decode", answer)))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        yield served


async def both_are_told(served: Served, workers: list[FakeWorker], key: wpb.AttemptKey) -> None:
    for worker in workers:
        assert (await worker.next_frame("cancel")).key == key
    await served.until(lambda: served.router.dispatcher.is_idle)
    assert all(session.num_attempts == 0 for session in served.router.registry.sessions)


async def test_cancelling_the_grpc_call_frees_both_workers(workers: list[FakeWorker], remote: Served) -> None:
    call, key = await running_remote(remote, *workers)
    call.cancel()
    await both_are_told(remote, workers, key)


async def test_cancel_by_id_frees_both_workers_and_ends_the_stream(workers: list[FakeWorker], remote: Served) -> None:
    call, key = await running_remote(remote, *workers)
    assert (await remote.grpc.Cancel(pb.CancelRequest(request_id=key.request_id))).found
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert error.value.code() == grpc.StatusCode.CANCELLED
    await both_are_told(remote, workers, key)
    assert not (await remote.grpc.Cancel(pb.CancelRequest(request_id=key.request_id))).found
    record = await remote.record(key.request_id)
    assert record["error"].startswith("RequestCancelled")


async def test_a_grpc_deadline_frees_both_workers(workers: list[FakeWorker], remote: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tokens_of(remote.grpc.Generate(request(max_tokens=100), timeout=0.5))
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    key = workers[0].received("prefill")[0].key
    assert workers[0].received("prefill")[0].spec.deadline_s <= 0.5
    await both_are_told(remote, workers, key)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_frees_both_workers(
    workers: list[FakeWorker], remote: Served, stream: bool
) -> None:
    async with httpx.AsyncClient(base_url=str(remote.http.base_url), timeout=10) as client:
        body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 100, "stream": stream}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        key = (await workers[0].next_frame("prefill")).key
        await remote.until(lambda: remote.router.recent.get(key.request_id).num_output_tokens == 1)  # type: ignore[union-attr]
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await both_are_told(remote, workers, key)


async def test_a_client_that_hangs_up_before_the_first_token_frees_the_worker(
    workers: list[FakeWorker], served: Served
) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    async with httpx.AsyncClient(base_url=str(served.http.base_url), timeout=10) as client:
        body = {"model": MODEL, "prompt": [1, 2, 3], "stream": True}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        key = (await workers[0].next_frame("generate")).key
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await both_are_told(served, workers, key)


@pytest.mark.parametrize(
    ("path", "method", "body"),
    [
        ("/v1/completions", "completion", {"prompt": "a"}),
        ("/v1/chat/completions", "chat", {"messages": []}),
        ("/tokenize", "to_tokenize", {"prompt": "a"}),
        ("/detokenize", "to_detokenize", {"tokens": [1]}),
    ],
)
async def test_a_client_that_hangs_up_while_its_request_is_read_ends_the_reading(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, method: str, body: dict[str, object]
) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def endless(_reader: RequestReader, _body: bytes) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr(RequestReader, method, endless)
    async with httpx.AsyncClient(base_url=str(served.http.base_url), timeout=10) as client:
        asking = asyncio.create_task(client.post(path, json={"model": MODEL, **body}))
        await asyncio.wait_for(began.wait(), WAIT_S)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await asyncio.wait_for(ended.wait(), WAIT_S)


async def test_a_client_that_hangs_up_while_queued_leaves_the_queue(workers: list[FakeWorker]) -> None:
    workers.append(FakeWorker("d0"))
    async with serving(router={"max_concurrent": 1}) as served:
        await served.attach(*workers)
        first = ask(served)
        await workers[0].next_frame("generate")
        call = served.grpc.Generate(request())
        await served.until(lambda: served.router.dispatcher.admission.queued == 1)
        call.cancel()
        await served.until(lambda: served.router.dispatcher.admission.queued == 0)
        first.cancel()
        await served.until(lambda: served.router.dispatcher.is_idle)
        assert served.router.dispatcher.admission.running == 0
        assert len(workers[0].received("generate")) == 1


async def test_the_request_timeout_is_a_504_and_frees_the_worker(workers: list[FakeWorker]) -> None:
    workers.append(FakeWorker("d0"))
    async with serving(server={"request_timeout_s": 0.3}) as served:
        await served.attach(*workers)
        response = await ask(served)
        assert response.status_code == 504
        assert kind_and_code(response) == ("server_error", "timeout")
        await both_are_told(served, workers, workers[0].received("generate")[0].key)


async def test_a_cancel_while_decode_reserves_reaches_decode_only(workers: list[FakeWorker]) -> None:
    decode, prefill = FakeWorker("d0", "decode"), FakeWorker("p0", "prefill", answer)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        call = served.grpc.Generate(request())
        key = (await decode.next_frame("open")).key
        call.cancel()
        assert (await decode.next_frame("cancel")).key == key
        decode.say(reserved=wpb.Reserved(key=key, lease=1, generation=1))
        await served.until(lambda: served.router.metrics.registry.get_sample_value("baton_fenced_frames_total") == 1)
        assert not prefill.received("prefill")
        assert not prefill.received("cancel")


@pytest.mark.parametrize("decode_first", [False, True])
async def test_a_finished_request_cancels_nobody(workers: list[FakeWorker], remote: Served, decode_first: bool) -> None:
    """Whichever worker's frames arrive first."""
    prefill, decode = workers
    prefill.script = None
    answering = ask(remote)
    command = await prefill.next_frame("prefill")
    if decode_first:
        emit(decode, command.key, command.spec, 1, 8)
        await remote.until(lambda: _num_held(remote) == 7)
        emit(prefill, command.key, command.spec, 0, 1)
    else:
        emit(prefill, command.key, command.spec, 0, 1)
        await remote.until(lambda: remote.router.recent.get(command.key.request_id).num_output_tokens == 1)  # type: ignore[union-attr]
        emit(decode, command.key, command.spec, 1, 8)
    assert token_ids(await answering) == TOKENS
    await remote.until(lambda: remote.router.dispatcher.is_idle)
    await asyncio.gather(*(told_in_order(worker) for worker in workers))
    assert not prefill.received("cancel")
    assert not decode.received("cancel")


async def told_in_order(worker: FakeWorker) -> None:
    """Returns when the worker has heard what was sent before now: the next heartbeat comes after it."""
    heard = worker.num_router_heartbeats
    async with asyncio.timeout(10):
        while worker.num_router_heartbeats < heard + 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
