"""Several choices of one prompt: one is prefilled and handed over, the others go where the prompt lies."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from tests.support.fake_worker import FakeWorker, answer, emit, expected_tokens, pair_of_answers
from tests.unit.router.conftest import EOS_ID, MODEL, Served, serving


def ignores_prompts(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
    """Reserves and connects, and says no token by itself."""
    if frame.WhichOneof("frame") not in ("generate", "prefill"):
        answer(worker, frame)


def choices_of(commands: list[Any]) -> list[int]:
    return [command.spec.choice for command in commands]


def emit_choice(worker: FakeWorker, command: Any, start: int, stop: int) -> None:
    emit(worker, command.key, command.spec, start, stop)


@pytest.mark.parametrize("policy", ["local", "remote"])
async def test_one_prefill_and_one_hand_over_for_all(workers: list[FakeWorker], policy: str) -> None:
    prefill, decode = pair_of_answers("p0", "d0")
    workers.extend((prefill, decode))
    async with serving(router={"policy": policy}) as served:
        await served.attach(*workers)
        response = await served.complete(n=3, max_tokens=4, seed=8, return_token_ids=True)
        content = response.json()
        metrics = (await served.http.get("/metrics")).text
        listed = await served.record(content["id"])
    remote = policy == "remote"
    assert len(decode.received("open")) == len(prefill.received("prefill")) == int(remote)
    assert choices_of(decode.received("generate")) == ([1, 2] if remote else [0, 1, 2])
    assert not prefill.received("generate")
    forks = [(command.fork_of.request_id, command.fork_of.attempt) for command in decode.received("generate")[-2:]]
    assert forks == [(f"{content['id']}-0", 1)] * 2
    assert remote or not decode.received("generate")[0].HasField("fork_of")
    specs = [command.spec for command in [*decode.received("open"), *decode.received("generate")]]
    assert {(spec.seed, tuple(spec.token_ids), spec.num_emitted) for spec in specs} == {(8, (1, 2, 3), 0)}
    assert [choice["index"] for choice in content["choices"]] == [0, 1, 2]
    assert all(choice["token_ids"] == expected_tokens(3, 4) for choice in content["choices"])
    assert content["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    assert "baton_prompt_tokens_total 3.0" in metrics
    assert [record["attempts"][0]["worker"] for record in listed["data"]] == ["d0"] * 3
    assert listed["data"][2]["reason"] == f"shares the prompt of {content['id']}-0"
    assert response.headers["x-baton-path"].startswith(f"{policy}; ")


async def test_the_others_wait_until_the_prompt_is_there(workers: list[FakeWorker]) -> None:
    prefill, decode = FakeWorker("p0", "prefill", ignores_prompts), FakeWorker("d0", "decode", ignores_prompts)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        asking = asyncio.create_task(served.complete(n=2, max_tokens=3, return_token_ids=True))
        first = await prefill.next_frame("prefill")
        emit_choice(prefill, first, 0, 1)
        await served.until(lambda: served.router.recent.get(f"{first.key.request_id}") is not None)
        record = served.router.recent.get(first.key.request_id)
        assert record is not None
        await served.until(lambda: record.num_output_tokens == 1)
        assert not decode.received("generate")  # the first token came from prefill: the KV may still be under way
        emit_choice(decode, first, 1, 2)
        second = await decode.next_frame("generate")
        assert second.key.request_id == first.key.request_id.removesuffix("0") + "1"
        emit_choice(decode, second, 0, 3)
        emit_choice(decode, first, 2, 3)
        content = (await asking).json()
        assert [choice["token_ids"] for choice in content["choices"]] == [expected_tokens(3, 3)] * 2


async def test_where_the_first_choice_ends_at_once_the_next_one_leads(workers: list[FakeWorker]) -> None:
    """An end at the first token leaves nothing at decode."""
    prefill, decode = pair_of_answers("p0", "d0")
    usual = prefill.script
    assert usual is not None

    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.WhichOneof("frame") == "prefill" and frame.prefill.spec.choice == 0:
            worker.say_tokens(frame.prefill.key, 0, [EOS_ID], "stop")
        else:
            usual(worker, frame)

    prefill.script = script
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        content = (await served.complete(n=4, max_tokens=3, return_token_ids=True)).json()
        assert choices_of(prefill.received("prefill")) == [0, 1]
        assert choices_of(decode.received("generate")) == [2, 3]
        assert [choice["finish_reason"] for choice in content["choices"]] == ["stop", *["length"] * 3]
        assert content["usage"]["completion_tokens"] == 10
        single = (await served.complete(n=3, max_tokens=1)).json()
        assert single["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


async def test_every_choice_recovers_by_itself(workers: list[FakeWorker]) -> None:
    """The worker that has the prompt dies: each choice goes on behind its own tokens, with its own number."""
    dying, healthy = FakeWorker("d0", script=ignores_prompts), FakeWorker("d1", script=answer)
    workers.extend((dying, healthy))
    async with serving(router={"policy": "local"}) as served:
        await served.attach(dying)
        asking = asyncio.create_task(served.complete(n=3, max_tokens=6, min_tokens=4, return_token_ids=True))
        emit_choice(dying, await dying.next_frame("generate"), 0, 2)
        emit_choice(dying, await dying.next_frame("generate", 3), 0, 1)
        await served.until(lambda: "baton_generation_tokens_total 3.0" in served.router.metrics.render().decode())
        await served.attach(healthy)
        await dying.kill()
        content = (await asking).json()
        assert [choice["token_ids"] for choice in content["choices"]] == [expected_tokens(3, 6)] * 3
        specs = sorted((command.spec for command in healthy.received("generate")), key=lambda spec: spec.choice)
        assert [(spec.choice, spec.num_emitted, spec.max_tokens, spec.min_tokens) for spec in specs] == [
            (0, 2, 4, 2),
            (1, 0, 6, 4),
            (2, 1, 5, 3),
        ]
        assert not any(command.HasField("fork_of") for command in healthy.received("generate"))
        assert content["usage"] == {"prompt_tokens": 3, "completion_tokens": 18, "total_tokens": 21}


async def test_a_worker_that_refuses_or_is_gone_is_not_waited_for(workers: list[FakeWorker]) -> None:
    def full(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.WhichOneof("frame") == "generate" and frame.generate.spec.choice:
            worker.say(refused=wpb.Refused(key=frame.generate.key, code="busy", retry_after_s=60))
        else:
            answer(worker, frame)

    workers.extend((FakeWorker("d0", script=full), FakeWorker("d1", script=answer)))
    workers[1].beat.num_running = 50
    async with serving(router={"policy": "local"}) as served:
        await served.attach(*workers)
        session = served.router.registry.session("d1")
        await served.until(lambda: session.snapshot().num_requests >= 50)
        content = (await served.complete(n=3, max_tokens=4, return_token_ids=True)).json()
        assert [choice["token_ids"] for choice in content["choices"]] == [expected_tokens(3, 4)] * 3
        assert choices_of(workers[1].received("generate")) == [1, 2]


async def test_a_stream_interleaves_choices_with_their_index(workers: list[FakeWorker]) -> None:
    workers.append(FakeWorker("d0", script=ignores_prompts))
    (worker,) = workers
    async with serving(router={"policy": "local"}) as served:
        await served.attach(worker)
        body = {"model": MODEL, "prompt": [1, 2, 3], "n": 2, "max_tokens": 3, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "return_token_ids": True}

        async def speak() -> None:
            first = await worker.next_frame("generate")
            emit_choice(worker, first, 0, 1)
            second = await worker.next_frame("generate", 2)
            emit_choice(worker, second, 0, 3)
            await served.until(lambda: worker.received("generate") == [first, second])
            emit_choice(worker, first, 1, 3)

        speaking = asyncio.create_task(speak())
        async with served.http.stream("POST", "/v1/completions", json=body) as response:
            data = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
        await speaking
    assert data.pop() == "[DONE]"
    *chunks, last = [json.loads(item) for item in data]
    of_each: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        of_each[choice["index"]].append(choice)
    for choices in of_each.values():
        assert [token for choice in choices for token in choice["token_ids"]] == expected_tokens(3, 3)
        assert [choice["finish_reason"] for choice in choices][-1] == "length"
        assert not any(choice["finish_reason"] for choice in choices[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["index"] == 0
    assert chunks[1]["choices"][0]["index"] == 1
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


async def test_prompts_times_choices_are_numbered_prompt_by_prompt(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    content = (await served.complete(prompt=[[1], [1, 2, 3, 4]], n=2, max_tokens=2, return_token_ids=True)).json()
    expected = [expected_tokens(1, 2)] * 2 + [expected_tokens(4, 2)] * 2
    assert [choice["token_ids"] for choice in content["choices"]] == expected
    assert sorted(choices_of(workers[0].received("generate"))) == [0, 0, 1, 1]
    assert content["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}


async def test_choices_over_grpc_and_cancelling_all_of_them(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    request = pb.GenerateRequest(
        model=MODEL, text="abc", sampling=pb.SamplingParams(n=2, max_tokens=3), return_token_ids=True
    )
    responses = [response async for response in served.grpc.Generate(request)]
    for index in (0, 1):
        own = [response for response in responses if response.index == index]
        assert [token for response in own for token in response.token_ids] == expected_tokens(3, 3)
        assert (own[-1].finish_reason, own[-1].path) == ("length", "local")
    assert [response.HasField("usage") for response in responses] == [False] * (len(responses) - 1) + [True]
    assert responses[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=6, total_tokens=9)
    (request_id,) = {response.request_id for response in responses}
    assert not (await served.grpc.Cancel(pb.CancelRequest(request_id=request_id))).found

    workers[0].script = ignores_prompts
    call = served.grpc.Generate(request)
    command = await workers[0].next_frame("generate", 3)
    group = command.key.request_id.removesuffix("-0")
    assert not (await served.grpc.Cancel(pb.CancelRequest(request_id="cmpl"))).found
    assert (await served.grpc.Cancel(pb.CancelRequest(request_id=group))).found
    with pytest.raises(Exception, match="cancelled"):
        _ = [response async for response in call]
    await served.until(lambda: served.router.dispatcher.is_idle)
    assert len(workers[0].received("generate")) == 3
    assert (await workers[0].next_frame("cancel")).key == command.key


async def test_a_client_that_leaves_frees_every_choice(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=ignores_prompts))
    await served.attach(*workers)
    body = {"model": MODEL, "prompt": [1, 2, 3], "n": 3, "max_tokens": 5, "stream": True}

    async def speak() -> None:
        emit_choice(workers[0], await workers[0].next_frame("generate"), 0, 1)

    speaking = asyncio.create_task(speak())
    async with served.http.stream("POST", "/v1/completions", json=body) as response:
        await workers[0].next_frame("generate", 3)
        assert response.status_code == 200
    await speaking
    await workers[0].next_frame("cancel", 3)
    await served.until(lambda: served.router.dispatcher.is_idle)
    assert served.router.dispatcher.admission.running == 0
