"""Good requests over real HTTP and gRPC, on both paths: tokens, text, usage, finish reason, path, timeline."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.common import events
from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from tests.support.fake_worker import FakeWorker, answer, expected_tokens, pair_of_answers
from tests.unit.router.conftest import EOS_ID, MODEL, Served, serving


async def stream(served: Served, **fields: Any) -> tuple[str, list[dict[str, Any]]]:
    """(x-baton-path, chunks) of a streamed completion that ends with [DONE]."""
    body = {"model": MODEL, "prompt": [1, 2, 3], "stream": True, **fields}
    async with served.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert data[-1] == "[DONE]"
    return response.headers["x-baton-path"], [json.loads(item) for item in data[:-1]]


@pytest.mark.parametrize("policy", ["local", "remote"])
async def test_both_paths_answer_over_http_stream_and_grpc(workers: list[FakeWorker], policy: str) -> None:
    workers.extend(pair_of_answers("p0", "d0"))
    expected = expected_tokens(3, 6)
    async with serving(router={"policy": policy}) as served:
        await served.attach(*workers)
        whole = await served.complete(max_tokens=6, return_token_ids=True)
        content = whole.json()
        assert content["object"] == "text_completion"
        assert content["choices"][0]["token_ids"] == expected
        assert content["choices"][0]["text"] == served.tokenizer.decode(expected)
        assert content["choices"][0]["finish_reason"] == "length"
        assert content["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
        assert whole.headers["x-baton-path"].startswith(f"{policy}; {policy} asked for")

        path, chunks = await stream(served, max_tokens=6, return_token_ids=True, stream_options={"include_usage": True})
        assert path.startswith(f"{policy}; ")
        *parts, last = chunks
        assert [token for part in parts for token in part["choices"][0]["token_ids"]] == expected
        assert "".join(part["choices"][0]["text"] for part in parts) == served.tokenizer.decode(expected)
        assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert all(part["usage"] is None for part in parts)
        assert last["choices"] == []
        assert last["usage"] == content["usage"]

        responses = [
            response
            async for response in served.grpc.Generate(
                pb.GenerateRequest(
                    model=MODEL,
                    token_ids=pb.TokenIds(ids=[1, 2, 3]),
                    sampling=pb.SamplingParams(max_tokens=6),
                    return_token_ids=True,
                )
            )
        ]
        assert [token for response in responses for token in response.token_ids] == expected
        assert responses[-1].finish_reason == "length"
        assert responses[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=6, total_tokens=9)
        assert responses[-1].path == policy
        assert policy in responses[-1].path_reason
        assert not any(response.HasField("finish_reason") for response in responses[:-1])


async def test_every_chunk_carries_the_usage_so_far_where_that_is_asked_for(
    workers: list[FakeWorker], served: Served
) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, (*parts, last) = await stream(served, max_tokens=4, n=2, return_token_ids=True, stream_options=options)
    seen = 0
    for part in parts:
        seen += len(part["choices"][0]["token_ids"])
        assert part["usage"]["prompt_tokens"] == 3
        assert part["usage"]["completion_tokens"] >= seen
    assert last["usage"] == parts[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}


async def test_chunks_carry_no_usage_and_no_ids_unless_asked(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    _, chunks = await stream(served, max_tokens=2)
    assert all("usage" not in chunk for chunk in chunks)
    assert all("token_ids" not in chunk["choices"][0] for chunk in chunks)


async def test_text_prompts_are_tokenised_and_lists_answer_in_order(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    content = (await served.complete(prompt=["a", "abcd"], max_tokens=3, return_token_ids=True)).json()
    assert [choice["index"] for choice in content["choices"]] == [0, 1]
    assert [choice["token_ids"] for choice in content["choices"]] == [expected_tokens(1, 3), expected_tokens(4, 3)]
    assert content["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    listed = await served.record(content["id"])
    assert [record["id"] for record in listed["data"]] == [f"{content['id']}-0", f"{content['id']}-1"]

    _, chunks = await stream(served, prompt=[[1], [1, 2, 3, 4]], max_tokens=3, return_token_ids=True)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks:
        tokens[chunk["choices"][0]["index"]] += chunk["choices"][0]["token_ids"]
    assert tokens == {0: expected_tokens(1, 3), 1: expected_tokens(4, 3)}


async def test_the_worker_gets_what_the_client_asked_for(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    await served.complete(max_tokens=4, temperature=0.5, top_p=0.25, top_k=7, seed=-1, prompt="a")
    await served.complete(ignore_eos=True, temperature=1e-9)
    await served.complete()
    asked, greedy, default = (command.spec for command in workers[0].received("generate"))
    assert list(asked.token_ids) == list(served.tokenizer.encode("a"))
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.top_k) == (4, 0.5, 0.25, 7)
    assert asked.seed == 2**64 - 1
    assert list(asked.stop_token_ids) == [EOS_ID]
    assert list(greedy.stop_token_ids) == []
    assert greedy.temperature == 0
    assert (default.max_tokens, default.temperature, default.top_p, default.top_k) == (16, 1.0, 1.0, -1)
    assert 590 < default.deadline_s <= 600
    assert default.seed != greedy.seed


async def test_the_default_length_shrinks_to_the_room_that_is_left(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    response = await served.complete(prompt=[1] * 509)
    assert response.json()["usage"]["completion_tokens"] == 3


async def test_the_models_endpoint_names_the_length(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    (card,) = (await served.http.get("/v1/models")).json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", 512)
    listed = await served.grpc.ListModels(pb.ListModelsRequest())
    assert [(card.id, card.max_model_len) for card in listed.models] == [(MODEL, 512)]


async def test_a_stop_string_ends_the_request_and_its_workers(workers: list[FakeWorker], served: Served) -> None:
    """The stop string spans two tokens; the worker says more, which nobody sees."""
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    ids = list(served.tokenizer.encode("one STOP two"))
    stop_at = "one ST".__len__()

    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.WhichOneof("frame") == "generate":
            for index, token in enumerate(ids):
                worker.say_tokens(frame.generate.key, index, [token])

    workers[0].script = script
    response = await served.complete(stop=["ST", "zzz"], max_tokens=100, return_token_ids=True)
    content = response.json()
    assert content["choices"][0]["text"] == "one "
    assert content["choices"][0]["finish_reason"] == "stop"
    assert content["choices"][0]["token_ids"] == ids[:stop_at]
    assert content["usage"]["completion_tokens"] == stop_at
    assert (await workers[0].next_frame("cancel")).key.request_id == content["id"]
    record = await served.record(content["id"])
    assert (record["finish_reason"], record["completion_tokens"]) == ("stop", stop_at)


async def test_eos_ends_with_stop_and_has_no_text(workers: list[FakeWorker], served: Served) -> None:
    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.WhichOneof("frame") == "generate":
            worker.say_tokens(frame.generate.key, 0, [*served.tokenizer.encode("hi"), EOS_ID], "stop")

    workers.append(FakeWorker("d0", script=script))
    await served.attach(*workers)
    content = (await served.complete(return_token_ids=True)).json()
    assert content["choices"][0]["text"] == "hi"
    assert content["choices"][0]["token_ids"][-1] == EOS_ID
    assert content["choices"][0]["finish_reason"] == "stop"
    assert content["usage"]["completion_tokens"] == 3


async def test_a_character_split_over_chunks_is_whole_in_the_stream(workers: list[FakeWorker], served: Served) -> None:
    ids = list(served.tokenizer.encode("\u4f60\u597d"))

    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.WhichOneof("frame") == "generate":
            for index, token in enumerate(ids):
                worker.say_tokens(frame.generate.key, index, [token], "length" if index + 1 == len(ids) else "")

    workers.append(FakeWorker("d0", script=script))
    await served.attach(*workers)
    _, chunks = await stream(served, max_tokens=len(ids))
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "\u4f60\u597d"
    assert all(text in ("", "\u4f60", "\u597d", "\u4f60\u597d") for text in texts)


async def test_a_request_that_ends_at_its_first_token_never_decodes(workers: list[FakeWorker]) -> None:
    workers.extend(pair_of_answers("p0", "d0"))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        content = (await served.complete(max_tokens=1, return_token_ids=True)).json()
        assert content["choices"][0]["token_ids"] == expected_tokens(3, 1)
        assert content["choices"][0]["finish_reason"] == "length"
        assert (await workers[1].next_frame("cancel")).key.request_id == content["id"]


async def test_the_timeline_has_both_workers_events_and_parts_that_sum(workers: list[FakeWorker]) -> None:
    prefill, decode = pair_of_answers("p0", "d0")
    healthy = prefill.script
    assert healthy is not None

    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.WhichOneof("frame") == "prefill":
            key = frame.prefill.key
            worker.say_events(key, [(events.PREFILL_START, 0.0001), (events.PREFILL_END, 0.0003)])
            decode.say_events(key, [(events.ADMITTED, 0.002)])
        healthy(worker, frame)

    prefill.script = script
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        record = await served.record((await served.complete(max_tokens=3)).json()["id"])
        assert record["path"] == "remote"
        assert record["attempts"][0]["prefill_worker"] == "p0"
        assert record["attempts"][0]["outcome"] == "finished"
        parts = record["ttft_parts_us"]
        assert sum(parts.values()) == record["ttft_us"]
        assert (parts["prefill_queue"], parts["prefill_compute"]) == (100, 200)
        assert parts["reserve"] > 0
        assert record["ttft_us"] <= record["second_token_us"] <= record["last_token_us"]
        seen = {(event["source"], event["name"]) for event in record["events"]}
        assert {("p0", events.PREFILL_END), ("d0", events.ADMITTED), ("router", events.RESERVED)} <= seen


async def test_the_client_request_id_is_echoed_only_if_harmless(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    body = {"model": MODEL, "prompt": [1]}
    good = await served.http.post("/v1/completions", json=body, headers={"x-request-id": "abc-1.2_3"})
    bad = await served.http.post("/v1/completions", json=body, headers={"x-request-id": "a b;c"})
    assert good.headers["x-request-id"] == "abc-1.2_3"
    assert good.json()["id"] != "abc-1.2_3"
    assert "x-request-id" not in bad.headers


async def test_metrics_count_what_happened(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    await served.complete(max_tokens=5)
    await served.until(lambda: served.router.dispatcher.is_idle)
    text = (await served.http.get("/metrics")).text
    for line in (
        'baton_requests_total{finish_reason="length",path="local"} 1.0',
        "baton_requests_running 0.0",
        "baton_requests_queued 0.0",
        "baton_prompt_tokens_total 3.0",
        "baton_generation_tokens_total 5.0",
        'baton_attempts_total{outcome="finished",path="local"} 1.0',
        'baton_time_to_first_token_seconds_count{path="local"} 1.0',
        'baton_time_per_output_token_seconds_count{path="local"} 1.0',
        'baton_e2e_request_latency_seconds_count{path="local"} 1.0',
        "baton_inter_token_latency_seconds_count 4.0",
        'baton_worker_up{role="decode",worker="d0"} 1.0',
        'baton_kv_blocks{state="free",worker="d0"} 64.0',
    ):
        assert line in text, line


async def test_emitting_in_groups_changes_nothing(workers: list[FakeWorker], served: Served) -> None:
    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.WhichOneof("frame") == "generate":
            command = frame.generate
            tokens = expected_tokens(3, 5)
            worker.say_tokens(command.key, 0, tokens[:2])
            worker.say_tokens(command.key, 2, tokens[2:], "length")

    workers.append(FakeWorker("d0", script=script))
    await served.attach(*workers)
    content = (await served.complete(max_tokens=5, return_token_ids=True)).json()
    assert content["choices"][0]["token_ids"] == expected_tokens(3, 5)
