"""What is reported on a prompt: echo, its log-probabilities, whole, in streams, for every choice."""

from __future__ import annotations

import asyncio
import json

import pytest

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from tests.support.fake_worker import FakeWorker, answer
from tests.unit.router.conftest import MODEL, Served, serving
from tests.unit.router.reports import chunks_of, collect, joined, known, say, speaker


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
async def test_echo_repeats_and_reports_the_prompt(
    workers: list[FakeWorker], served: Served, as_ids: bool, streamed: bool
) -> None:
    workers.append(FakeWorker("d0", script=speaker(served, "xy")))
    await served.attach(*workers)
    ids = list(served.tokenizer.encode("p\u00e9q"))
    fields = {"prompt": ids if as_ids else "p\u00e9q", "echo": True, "logprobs": 1, "max_tokens": 2}
    if streamed:
        choices = await chunks_of(served, **fields)
    else:
        response = (await served.complete(**fields)).json()
        choices = response["choices"]
        assert response["usage"] == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    assert "".join(choice["text"] for choice in choices) == "p\u00e9qxy"
    logprobs = joined(choices)
    assert logprobs["tokens"] == ["p", "\ufffd", "\ufffd", "q", "x", "y"]
    assert logprobs["token_logprobs"] == [
        None,
        *(-token_id / 4 for token_id in [*ids[1:], *served.tokenizer.encode("xy")]),
    ]
    assert logprobs["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4]
    spec = workers[0].received("generate")[0].spec
    assert (spec.logprobs, spec.prompt_logprobs) == (1, 1)


async def test_echo_without_logprobs_asks_for_none(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(served, "xy")))
    await served.attach(*workers)
    (choice,) = (await served.complete(prompt="ab ", echo=True, max_tokens=2)).json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("ab xy", None)
    assert not workers[0].received("generate")[0].spec.HasField("prompt_logprobs")


async def test_echo_of_the_prompt_alone(workers: list[FakeWorker], served: Served) -> None:
    """What scores texts: no token is drawn for the client, and none is counted."""
    workers.append(FakeWorker("d0", script=speaker(served, "x")))
    await served.attach(*workers)
    fields = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0}
    content = (await served.complete(**fields)).json()
    (choice,) = content["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert content["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    chunks = await chunks_of(served, **fields)
    assert joined(chunks) == choice["logprobs"]
    assert workers[0].received("generate")[0].spec.max_tokens == 1


async def test_every_choice_echoes_what_the_first_has_learnt(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(served, "xy")))
    await served.attach(*workers)
    fields = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 2, "n": 3, "prompt_logprobs": 2}
    choices = (await served.complete(**fields)).json()["choices"]
    assert [choice["text"] for choice in choices] == ["abcxy"] * 3
    assert choices[0]["logprobs"] == choices[1]["logprobs"] == choices[2]["logprobs"]
    wanted = [command.spec.HasField("prompt_logprobs") for command in workers[0].received("generate")]
    assert wanted == [True, False, False]
    first, second, _ = choices[2]["prompt_logprobs"]
    assert first is None
    (b_id,) = served.tokenizer.encode("b")
    assert second[str(b_id)] == {"logprob": -b_id / 4, "rank": 3, "decoded_token": "b"}
    assert second["2"] == {"logprob": -2.0, "rank": 2, "decoded_token": served.tokenizer.texts.text(2)}


@pytest.mark.parametrize("over", ["HTTP", "gRPC"])
async def test_a_choice_that_is_sooner_than_the_report_on_its_prompt_waits_for_it(
    workers: list[FakeWorker], over: str
) -> None:
    """The prefill worker's first token, and with it the report, is late; decode already answers the second choice."""
    prefill, decode = FakeWorker("p0", "prefill", answer), FakeWorker("d0", "decode", answer)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        prefill.script, decode.script = None, reserve_only
        fields = {"model": MODEL, "prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 2, "n": 2, "stream": True}
        if over == "HTTP":
            post = served.http.build_request("POST", "/v1/completions", json=fields)
            opening = asyncio.create_task(served.http.send(post, stream=True))
        else:
            sampling = pb.SamplingParams(max_tokens=2, n=2)
            call = served.grpc.Generate(
                pb.GenerateRequest(model=MODEL, text="abc", echo=True, logprobs=1, sampling=sampling)
            )
            collecting = asyncio.create_task(collect(call))
        ids = served.tokenizer.encode("abcwxyz")
        first = (await prefill.next_frame("prefill")).key
        say(decode, first, 1, ids[4:5], finish_reason="length")
        second = (await decode.next_frame("generate")).key
        say(decode, second, 0, ids[5:], finish_reason="length")
        await served.until(lambda: ended(served, second.request_id))
        if over == "HTTP":
            response = await opening
        say(prefill, first, 0, ids[3:4], prompt_logprobs=map(known, ids[1:3]))
        if over == "HTTP":
            lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
            chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
            texts = ["".join(chunk["text"] for chunk in chunks if chunk["index"] == index) for index in (0, 1)]
            assert next(chunk for chunk in chunks if chunk["index"] == 1)["logprobs"]["tokens"][:3] == ["a", "b", "c"]
        else:
            answers = await collecting
            texts = ["".join(one.text for one in answers if one.index == index) for index in (0, 1)]
            assert [len(one.prompt_logprobs) for one in answers if one.index == 1] == [2]
        assert texts == ["abcwx", "abcyz"]


def reserve_only(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
    if frame.HasField("open"):
        answer(worker, frame)


def ended(served: Served, request_id: str) -> bool:
    record = served.router.recent.get(request_id)
    return record is not None and record.finish_reason is not None


async def test_a_streams_first_chunks_carry_the_report_on_the_prompt(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(served, "xy")))
    await served.attach(*workers)
    fields = {"prompt": "abc", "max_tokens": 2, "n": 2, "prompt_logprobs": 1}
    whole = (await served.complete(**fields)).json()["choices"]
    chunks = await chunks_of(served, **fields)
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert own[0]["prompt_logprobs"] == whole[index]["prompt_logprobs"]
        assert not any("prompt_logprobs" in chunk for chunk in own[1:])
    assert whole[0]["prompt_logprobs"][0] is None
    assert len(whole[0]["prompt_logprobs"]) == 3
