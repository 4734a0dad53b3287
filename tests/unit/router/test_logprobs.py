"""Log-probabilities in the API's forms, over fences, recoveries and stop strings."""

from __future__ import annotations

import asyncio
import json

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
from tests.support.fake_worker import FakeWorker
from tests.unit.router.conftest import EOS_ID, MODEL, Served, byte_tokenizer, serving
from tests.unit.router.reports import chunks_of, collect, joined, known, say, speaker
from tests.unit.router.test_text import BYTE_IDS, sentencepiece_tokenizer

TOKENS = byte_tokenizer().texts


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
        await asyncio.wait_for(prefill.next_frame("prefill"), 30)
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
