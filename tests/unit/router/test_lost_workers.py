"""Lost workers and failures: a stream goes on where it was, attempts are bounded, defects tell nothing."""

from __future__ import annotations

import grpc.aio
import pytest

from baton.common.sampling import SamplingParams
from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.completions import Completions
from router.types import GenerationRequest
from tests.support.fake_worker import FakeWorker, answer, emit
from tests.unit.router.asking import (
    TOKENS,
    ask,
    kind_and_code,
    next_token_ids,
    only_connect,
    request,
    responses_of,
    token_ids,
    tokens_of,
)
from tests.unit.router.conftest import MODEL, Served, serving


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
    prefill = FakeWorker("p0", "prefill", lambda worker, frame: only_connect(worker, frame))
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


async def test_a_stop_string_ends_a_request_also_while_it_waits_for_its_next_attempt(
    workers: list[FakeWorker], served: Served
) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    dispatcher = served.router.dispatcher
    generation = dispatcher.submit(GenerationRequest("stopped", (1, 2, 3), SamplingParams(max_tokens=8), 60.0))
    command = await workers[0].next_frame("generate")
    emit(workers[0], command.key, command.spec, 0, 2)
    assert (await anext(generation)).token_ids
    await workers[0].kill()
    await served.until(lambda: dispatcher.admission.parked == 1)
    generation.finish(2)
    await served.until(lambda: dispatcher.is_idle)
    assert dispatcher.admission.queued == dispatcher.admission.running == 0
    assert (generation.record.finish_reason, generation.record.error) == ("stop", None)
