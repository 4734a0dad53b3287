"""Log-probabilities and echo in the API's forms, over fences, recoveries and stop strings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.errors import InvalidRequest
from baton.common.sampling import TokenLogprobs
from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.completion_logprobs import LogprobLists
from router.json_pieces import dumps, encode
from router.report_limit import check_reports
from tests.support.fake_worker import FakeWorker, answer
from tests.unit.router.conftest import EOS_ID, MODEL, Served, byte_tokenizer, serving
from tests.unit.router.test_text import BYTE_IDS, sentencepiece_tokenizer

TOKENS = byte_tokenizer().texts


def known(token_id: int, others: Sequence[int] = (1, 2)) -> wpb.TokenLogprobs:
    """A report that the tests can tell by its token: everything follows from the id."""
    values = [-float(other) for other in others]
    return wpb.TokenLogprobs(
        token_id=token_id, logprob=-token_id / 4, rank=3, top_token_ids=others, top_logprobs=values
    )


def say(worker: FakeWorker, key: wpb.AttemptKey, position: int, ids: Sequence[int], **fields: Any) -> None:
    output = wpb.TokenOutput(key=key, position=position, token_ids=ids, logprobs=map(known, ids), **fields)
    worker.say(step=wpb.StepOutput(outputs=[output]))


def speaker(served: Served, text: str, finish: str = "length", step: int = 1) -> Any:
    """A worker's script that says a text, `step` tokens at a time, with what it was asked to report."""
    ids = list(served.tokenizer.encode(text))

    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.WhichOneof("frame") == "generate":
            command = frame.generate
            wants_prompt = command.spec.HasField("prompt_logprobs")
            for start in range(0, len(ids), step):
                said = ids[start : start + step]
                of_prompt = map(known, command.spec.token_ids[1:]) if wants_prompt and not start else ()
                end = finish if start + step >= len(ids) else ""
                say(worker, command.key, start, said, finish_reason=end, prompt_logprobs=of_prompt)

    return script


async def chunks_of(served: Served, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "stream": True, **fields}
    async with served.http.stream("POST", "/v1/completions", json=body) as response:
        data = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert data.pop() == "[DONE]"
    return [json.loads(item)["choices"][0] for item in data]


def joined(choices: list[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {key: [item for choice in choices for item in choice["logprobs"][key]] for key in keys}


@pytest.mark.parametrize("step", [1, 3])
async def test_output_tokens_are_reported_whole_and_in_a_stream(
    workers: list[FakeWorker], served: Served, step: int
) -> None:
    workers.append(FakeWorker("d0", script=speaker(served, "h\u00e9 you", step=step)))
    await served.attach(*workers)
    (choice,) = (await served.complete(prompt="q", logprobs=2, max_tokens=7)).json()["choices"]
    ids = served.tokenizer.encode("h\u00e9 you")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "\ufffd", "\ufffd", " ", "y", "o", "u"]
    assert logprobs["token_logprobs"] == [-token_id / 4 for token_id in ids]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4, 5]
    assert choice["text"] == "h\u00e9 you"
    texts = served.tokenizer.texts
    assert logprobs["top_logprobs"][0] == {texts.text(1): -1.0, texts.text(2): -2.0, "h": -ids[0] / 4}
    assert joined(await chunks_of(served, prompt="q", logprobs=2, max_tokens=7)) == logprobs


async def test_how_many_of_the_likeliest_and_their_names(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(served, "a")))
    await served.attach(*workers)
    (a_id,) = served.tokenizer.encode("a")
    for num_top, others in ((0, []), (1, [1])):
        fields = {"logprobs": num_top, "max_tokens": 1, "return_tokens_as_token_ids": True}
        logprobs = (await served.complete(**fields)).json()["choices"][0]["logprobs"]
        assert logprobs["tokens"] == [f"token_id:{a_id}"]
        expected = {f"token_id:{other}": -float(other) for other in others} | {f"token_id:{a_id}": -a_id / 4}
        assert logprobs["top_logprobs"] == [expected]
    assert (await served.complete(max_tokens=1)).json()["choices"][0]["logprobs"] is None


def test_tokens_with_one_text_keep_the_likeliest() -> None:
    """Parts of characters all read the same; clients look for the greedy token by its value."""
    lists = LogprobLists()
    lists.add([TokenLogprobs(9, -3.0, 3, ((7, -0.5), (8, -1.0)))], [0], 2, lambda _: "\ufffd")
    assert lists.top_logprobs == [{"\ufffd": -0.5}]


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


async def collect(call: Any) -> list[pb.GenerateResponse]:
    return [response async for response in call]


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


async def test_a_stop_string_or_token_is_part_of_the_text_where_that_is_asked_for(
    workers: list[FakeWorker], served: Served
) -> None:
    workers.append(FakeWorker("d0", script=speaker(served, "oneENDtwo", step=4)))
    await served.attach(*workers)
    asked = {"include_stop_str_in_output": True, "max_tokens": 9}
    (choice,) = (await served.complete(stop="END", **asked)).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("oneEND", "stop", "END")
    assert "".join(chunk["text"] for chunk in await chunks_of(served, prompt="a", stop="END", **asked)) == "oneEND"
    sampling = pb.SamplingParams(max_tokens=9, stop=["END"], include_stop_str_in_output=True)
    responses = await collect(served.grpc.Generate(pb.GenerateRequest(model=MODEL, text="a", sampling=sampling)))
    assert "".join(response.text for response in responses) == "oneEND"
    (q_id,) = served.tokenizer.encode("q")
    workers[0].script = speaker(served, "aq", "stop")
    (choice,) = (await served.complete(stop_token_ids=[q_id], **asked)).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("aq", "stop", q_id)
    workers[0].script = lambda worker, frame: say(worker, frame.generate.key, 0, [EOS_ID], finish_reason="stop")
    (choice,) = (await served.complete(**asked)).json()["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("", EOS_ID), "special tokens have no text"


async def test_reports_end_with_the_output(workers: list[FakeWorker], served: Served) -> None:
    """A stop token is reported, what follows a stop string is not."""
    workers.append(FakeWorker("d0", script=speaker(served, "oneENDtwo", step=4)))
    await served.attach(*workers)
    (choice,) = (await served.complete(stop="END", logprobs=0, max_tokens=9)).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one", "stop", "END")
    assert choice["logprobs"]["tokens"] == list("oneEND")
    (q_id,) = served.tokenizer.encode("q")
    workers[0].script = speaker(served, "aq", "stop")
    (choice,) = (await served.complete(stop_token_ids=[q_id], logprobs=0)).json()["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("a", q_id)
    assert choice["logprobs"]["tokens"] == ["a", "q"]
    workers[0].script = lambda worker, frame: say(worker, frame.generate.key, 0, [EOS_ID], finish_reason="stop")
    (choice,) = (await served.complete(logprobs=0)).json()["choices"]
    assert (choice["text"], choice["stop_reason"], choice["logprobs"]["tokens"]) == ("", EOS_ID, ["<eos>"])


async def test_stop_strings_wait_for_min_tokens(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(served, "aEbEc")))
    await served.attach(*workers)
    texts = {}
    for min_tokens in range(6):
        answer = await served.complete(stop="E", min_tokens=min_tokens, max_tokens=5)
        texts[min_tokens] = answer.json()["choices"][0]["text"]
    assert texts == {0: "a", 1: "a", 2: "aEb", 3: "aEb", 4: "aEbEc", 5: "aEbEc"}


async def test_reports_survive_recovery_and_repeated_tokens(workers: list[FakeWorker]) -> None:
    dying, healthy = FakeWorker("d0"), FakeWorker("d1")
    workers.extend((dying, healthy))
    async with serving(router={"policy": "local"}) as served:
        await served.attach(dying)
        ids = list(served.tokenizer.encode("abcdef"))
        asking = asyncio.create_task(
            served.complete(prompt=ids, echo=True, logprobs=1, max_tokens=6, frequency_penalty=1.0)
        )
        key = (await dying.next_frame("generate")).key
        say(dying, key, 0, ids[:2], prompt_logprobs=map(known, ids[1:]))
        say(dying, key, 1, ids[1:3])  # one of these is a repeat
        await served.until(lambda: "baton_generation_tokens_total 3.0" in served.router.metrics.render().decode())
        await served.attach(healthy)
        await dying.kill()
        again = await healthy.next_frame("generate")
        assert (again.spec.num_emitted, list(again.spec.token_ids)) == (3, [*ids, *ids[:3]])
        say(healthy, again.key, 3, ids[3:], finish_reason="length")
        (choice,) = (await asking).json()["choices"]
    assert choice["text"] == "abcdef" * 2
    assert choice["logprobs"]["token_logprobs"] == [None, *(-token_id / 4 for token_id in [*ids[1:], *ids])]
    assert choice["logprobs"]["text_offset"] == list(range(12))


async def test_a_token_that_overtakes_the_first_keeps_its_report(workers: list[FakeWorker]) -> None:
    """Decode's first token may arrive before that of prefill."""
    prefill, decode = FakeWorker("p0", "prefill"), FakeWorker("d0", "decode")
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        served.router.registry.set_members([])
        for worker in workers:
            await worker.start()
        attaching = asyncio.create_task(served.attach(*workers))
        await prefill.next_frame("connect_peer")
        prefill.say_connected(decode)
        await attaching
        asking = asyncio.create_task(served.complete(logprobs=0, max_tokens=3, return_token_ids=True))
        key = (await decode.next_frame("open")).key
        decode.say(reserved=wpb.Reserved(key=key, lease=1, generation=1))
        await prefill.next_frame("prefill")
        fenced = served.router.registry.session("d0")
        say(decode, key, 1, [21])
        await served.until(lambda: fenced.num_attempts == 1)
        say(prefill, key, 0, [20])
        await asyncio.wait_for(prefill.next_frame("prefill"), 5)
        say(decode, key, 2, [22], finish_reason="length")
        (choice,) = (await asking).json()["choices"]
    assert choice["token_ids"] == [20, 21, 22]
    assert choice["logprobs"]["token_logprobs"] == [-5.0, -5.25, -5.5]


async def test_the_same_over_grpc(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(served, "xy.", "stop")))
    await served.attach(*workers)
    request = pb.GenerateRequest(
        model=MODEL, text="ab", sampling=pb.SamplingParams(stop=["."]), echo=True, logprobs=1, prompt_logprobs=2
    )
    responses = [response async for response in served.grpc.Generate(request)]
    assert "".join(response.text for response in responses) == "abxy"
    of_prompt = [entry for response in responses for entry in response.prompt_logprobs]
    assert [(entry.text, entry.rank, len(entry.top)) for entry in of_prompt] == [("b", 3, 2)]
    entries = [entry for response in responses for entry in response.logprobs]
    assert [entry.text for entry in entries] == ["x", "y", "."]
    assert [entry.logprob for entry in entries] == [-token_id / 4 for token_id in served.tokenizer.encode("xy.")]
    assert [[top.token_id for top in entry.top] for entry in entries] == [[1]] * 3
    assert responses[-1].stop_string == "."


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "num_choices", "logprobs", "prompt_logprobs", "param"),
    [
        ([1000] * 2, [48] * 2, 1, 1, 1, None),
        ([2**20], [2**20], 128, None, None, None),
        ([1], [2**20], 1, 1, None, None),
        ([1], [2**20], 1, 2, None, "logprobs"),
        ([1], [2**14], 128, 0, None, None),
        ([1], [2**14 + 1], 128, 0, None, "logprobs"),
        ([2**10] * 128, [1] * 128, 1, None, 15, None),
        ([2**10] * 128, [1] * 128, 1, None, 16, "prompt_logprobs"),
        ([2**10] * 64, [2] * 64, 2, 15, 15, "logprobs"),
    ],
)
def test_a_request_may_ask_for_so_many(
    lengths: list[int],
    max_tokens: list[int],
    num_choices: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    param: str | None,
) -> None:
    if param is None:
        check_reports(lengths, max_tokens, num_choices, logprobs, prompt_logprobs)
        return
    with pytest.raises(InvalidRequest, match="limit") as error:
        check_reports(lengths, max_tokens, num_choices, logprobs, prompt_logprobs)
    assert error.value.param == param


async def test_too_long_a_report_is_refused_before_anything_runs(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", max_model_len=2**17, num_blocks=2**13))
    await served.attach(*workers)
    refused = await served.complete(n=128, logprobs=20, max_tokens=1000)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "logprobs"
    assert not workers[0].received("generate")


@settings(deadline=None)
@given(st.text(max_size=20))
def test_offsets_are_where_the_characters_begin(text: str) -> None:
    from_bytes = [BYTE_IDS[byte] for byte in text.encode()]
    offsets = TOKENS.offsets(from_bytes, text)
    assert len(offsets) == len(from_bytes)
    starts = [index for index, byte in enumerate(text.encode()) if byte & 0xC0 != 0x80]
    assert [offsets[start] for start in starts] == list(range(len(text)))


def test_pieces_of_the_sentencepiece_kind() -> None:
    texts = sentencepiece_tokenizer().texts
    assert [texts.text(256), texts.text(257), texts.text(258)] == [" the", " cat", "s"]
    assert texts.raw(0x0A) == b"\n"
    assert texts.raw(0xC3) == b"\xc3"
    assert texts.offsets([256, 257, 258], "the cats") == [0, 3, 7]


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 2000])
async def test_large_answers_are_written_as_json_writes_them(size: int) -> None:
    content = {
        "a": [{"b": [{"c": list(range(size)), "d": {}}], "e": [None] * size}],
        "text": "\u2028" * size,
        "f": [],
        "g": [[{"h": [-0.5] * size}]] * 3,
    }
    assert await encode(content) == dumps(content) == json.dumps(content, separators=(",", ":"))
