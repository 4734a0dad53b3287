"""Whatever a client sends wrongly gets a 4xx in OpenAI's form, at once, and nothing reaches a worker."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import BadRequest  # type: ignore[import-untyped]
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.errors import InvalidRequest
from protos import inference_pb2 as pb
from router import body_limit, http_protocol
from router.json_limits import MAX_CONTAINERS, check_structure
from router.unsupported import UnsupportedFields
from tests.support.fake_worker import FakeWorker, answer
from tests.unit.router.conftest import MODEL, Served, serving


def body(**fields: Any) -> str:
    return json.dumps({"model": MODEL, "prompt": [1, 2, 3], **fields})


BAD: list[tuple[str, str | bytes, int, str | None]] = [
    ("empty", "", 400, None),
    ("not json", "{", 400, None),
    ("not an object", "[1]", 400, None),
    ("null", "null", 400, None),
    ("broken utf-8", b'{"prompt":"\xff"}', 400, None),
    ("lone surrogate", '{"model":"fake","prompt":"\\ud800"}', 400, None),
    ("deep", '{"prompt":' + "[" * 100_000 + "}", 400, None),
    ("deep and closed", '{"x":' + "[" * 5000 + "]" * 5000 + "}", 400, None),
    ("huge number", '{"max_tokens":' + "9" * 10_000 + "}", 400, None),
    ("NaN", '{"model":"fake","prompt":"a","temperature":NaN}', 400, "temperature"),
    ("Infinity", '{"model":"fake","prompt":"a","top_p":Infinity}', 400, "top_p"),
    ("1e999", '{"model":"fake","prompt":"a","temperature":1e999}', 400, "temperature"),
    ("no model", '{"prompt":"a"}', 400, "model"),
    ("no prompt", '{"model":"fake"}', 400, "prompt"),
    ("unknown model", body(model="other"), 404, "model"),
    ("model of wrong type", body(model=3), 400, "model"),
    ("empty prompt text", body(prompt=""), 400, "prompt"),
    ("empty prompt list", body(prompt=[]), 400, "prompt"),
    ("empty prompt in list", body(prompt=[[]]), 400, "prompt"),
    ("prompt of wrong type", body(prompt={"a": 1}), 400, "prompt"),
    ("null prompt", body(prompt=None), 400, "prompt"),
    ("mixed prompt", body(prompt=[1, "a"]), 400, "prompt"),
    ("bool as token", body(prompt=[True]), 400, "prompt"),
    ("float as token", body(prompt=[1.0]), 400, "prompt"),
    ("negative token", body(prompt=[-1]), 400, "prompt"),
    ("token outside the vocabulary", body(prompt=[300]), 400, "prompt"),
    ("token beyond 32 bits", body(prompt=[2**40]), 400, "prompt"),
    ("too many prompts", body(prompt=[[1]] * 129), 400, "prompt"),
    ("prompt too long", body(prompt=[1] * 513), 400, "prompt"),
    ("report on a text that fills the model", body(prompt="a" * 512, echo=True, max_tokens=0), 400, "prompt"),
    ("text prompt too long", body(prompt="a" * 513), 400, "prompt"),
    ("prompt and max_tokens too long", body(max_tokens=510), 400, "max_tokens"),
    ("max_tokens as text", body(max_tokens="3"), 400, "max_tokens"),
    ("max_tokens as bool", body(max_tokens=True), 400, "max_tokens"),
    ("max_tokens as float", body(max_tokens=1.5), 400, "max_tokens"),
    ("max_tokens zero", body(max_tokens=0), 400, "max_tokens"),
    ("max_tokens beyond everything", body(max_tokens=2**63), 400, "max_tokens"),
    ("temperature negative", body(temperature=-0.1), 400, "temperature"),
    ("temperature as text", body(temperature="1"), 400, "temperature"),
    ("temperature beyond float32", body(temperature=1e39), 400, "temperature"),
    ("top_p zero", body(top_p=0), 400, "top_p"),
    ("top_p above one", body(top_p=1.1), 400, "top_p"),
    ("top_k", body(top_k=-2), 400, "top_k"),
    ("seed too large", body(seed=2**64), 400, "seed"),
    ("five stop strings", body(stop=["a"] * 5), 400, "stop"),
    ("empty stop string", body(stop=[""]), 400, "stop"),
    ("long stop string", body(stop="a" * 2000), 400, "stop"),
    ("stop of wrong type", body(stop=[1]), 400, "stop"),
    ("stream as text", body(stream="true"), 400, "stream"),
    ("stream_options without stream", body(stream_options={"include_usage": True}), 400, "stream_options"),
    (
        "usage in every chunk but the last",
        body(stream=True, stream_options={"continuous_usage_stats": True}),
        400,
        "stream_options",
    ),
    ("stream_options of wrong type", body(stream=True, stream_options=[]), 400, "stream_options"),
    ("n of none", body(n=0), 400, "n"),
    ("n of too many", body(n=129), 400, "n"),
    ("too many choices", body(n=3, prompt=[[1]] * 43), 400, "n"),
    ("n as bool", body(n=True), 400, "n"),
    ("best_of", body(n=2, best_of=2), 400, "best_of"),
    ("logprobs as bool", body(logprobs=True), 400, "logprobs"),
    ("logprobs of too many", body(logprobs=21), 400, "logprobs"),
    ("all of the prompt's", body(prompt_logprobs=-1), 400, "prompt_logprobs"),
    ("no tokens without echo", body(max_tokens=0), 400, "max_tokens"),
    ("echo as number", body(echo=1), 400, "echo"),
    ("min_p", body(min_p=1.5), 400, "min_p"),
    ("penalty", body(presence_penalty=2.1), 400, "presence_penalty"),
    ("frequency", body(frequency_penalty=-2.1), 400, "frequency_penalty"),
    ("repetition", body(repetition_penalty=0), 400, "repetition_penalty"),
    ("NaN penalty", '{"model":"fake","prompt":"a","presence_penalty":NaN}', 400, "presence_penalty"),
    ("kv_transfer_params", body(kv_transfer_params={"lease": 1}), 400, "kv_transfer_params"),
    ("suffix", body(suffix="x"), 400, "suffix"),
    ("logit_bias too strong", body(logit_bias={"5": 101}), 400, "logit_bias"),
    ("logit_bias of text", body(logit_bias={"the": 1}), 400, "logit_bias"),
    ("logit_bias of nobody", body(logit_bias={"300": 1}), 400, "logit_bias"),
    ("logit_bias as list", body(logit_bias=[5]), 400, "logit_bias"),
    ("logit_bias of NaN", '{"model":"fake","prompt":"a","logit_bias":{"5":NaN}}', 400, "logit_bias"),
    ("response_format", body(response_format={"type": "json_object"}), 400, "response_format"),
    ("min_tokens over max_tokens", body(min_tokens=5, max_tokens=4), 400, "min_tokens"),
    ("min_tokens over the default", body(min_tokens=17), 400, "min_tokens"),
    ("stop_token_ids of nobody", body(stop_token_ids=[5, 300]), 400, "stop_token_ids"),
    ("stop_token_ids as text", body(stop_token_ids=["5"]), 400, "stop_token_ids"),
    ("priority", body(priority=1), 400, "priority"),
    ("grammar of another server", body(regex="a+"), 400, "regex"),
    ("skip_special_tokens", body(skip_special_tokens=False), 400, "skip_special_tokens"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[tuple[Served, FakeWorker]]:
    """One router and worker for both tables of bad requests: none of them may leave a trace."""
    worker = FakeWorker("d0", script=answer)
    async with serving() as served:
        await served.attach(worker)
        yield served, worker
    await worker.kill()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("content", "status", "param"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
async def test_a_bad_body_is_refused_by_name_and_reaches_nobody(
    shared: tuple[Served, FakeWorker], content: str | bytes, status: int, param: str | None
) -> None:
    served, worker = shared
    response = await served.http.post("/v1/completions", content=content)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]
    assert served.router.dispatcher.is_idle
    assert not worker.received("generate")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("fields", "code"),
    [({"max_tokens": "3"}, "invalid_type"), ({"stream": 1}, "invalid_type"), ({"top_p": 1.1}, "invalid_value")],
)
async def test_a_wrong_type_and_a_wrong_value_have_codes_of_their_own(
    shared: tuple[Served, FakeWorker], fields: dict[str, object], code: str
) -> None:
    response = await shared[0].http.post("/v1/completions", content=body(**fields))
    assert response.json()["error"]["code"] == code


async def test_the_length_limit_is_named(workers: list[FakeWorker], served: Served) -> None:
    """The pool (8 blocks of 16) is smaller than the model's 512."""
    workers.append(FakeWorker("d0", script=answer, num_blocks=8))
    await served.attach(*workers)
    error = (await served.complete(prompt=[1] * 128)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "128 tokens" in error["message"]
    fitting = await served.complete(prompt=[1] * 120, max_tokens=8)
    assert fitting.status_code == 200


async def test_neutral_values_of_unsupported_fields_and_unknown_fields_are_accepted(
    workers: list[FakeWorker], served: Served
) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    neutral: dict[str, Any] = {
        **dict.fromkeys(UnsupportedFields.model_fields),
        "n": 1,
        "best_of": 1,
        "echo": False,
        "suffix": "",
        "logit_bias": {},
        "presence_penalty": 0,
        "min_p": 0.0,
        "repetition_penalty": 1,
        "bad_words": [],
        "skip_special_tokens": True,
        "priority": 0,
        "response_format": {"type": "text"},
    }
    response = await served.complete(**neutral, user="me", something_new=[1], temperature=None, stop=None)
    assert response.status_code == 200, response.text
    assert "baton_ignored_fields_total 1.0" in (await served.http.get("/metrics")).text


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [4096, 1 << 25])
async def test_a_body_over_the_limit_is_refused_before_it_is_parsed(
    chunked: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends all of a large one before it reads sees the answer, too."""
    monkeypatch.setattr(body_limit, "_DISCARD_S", 60.0)
    monkeypatch.setattr(http_protocol, "_DISCARD_S", 60.0)
    async with serving(server={"max_body_bytes": 2048}) as served:
        content, piece = b'{"model":"fake","prompt":"' + b"a" * size, max(size // 8, 512)

        async def pieces() -> Any:
            for start in range(0, len(content), piece):
                yield content[start : start + piece]

        response = await served.http.post("/v1/completions", content=pieces() if chunked else content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/requests/unknown", 404),
        ("GET", "/docs", 404),
        ("GET", "/", 404),
    ],
)
async def test_http_errors_have_the_same_form(served: Served, method: str, path: str, status: int) -> None:
    response = await served.http.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert path == "/v1/requests/unknown" or path in error["message"]
    if status == 405:
        assert response.headers["allow"]


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"model": MODEL, "token_ids": pb.TokenIds(ids=[1, 2, 3]), **fields})


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("message", "code", "field"),
    [
        (pb.GenerateRequest(model=MODEL), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (request(token_ids=pb.TokenIds()), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (request(token_ids=pb.TokenIds(ids=[300])), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (request(token_ids=pb.TokenIds(ids=[1] * 600)), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (request(model="other"), grpc.StatusCode.NOT_FOUND, "model"),
        (request(sampling=pb.SamplingParams(max_tokens=0)), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (request(sampling=pb.SamplingParams(temperature=math.nan)), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (request(sampling=pb.SamplingParams(top_p=math.inf)), grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        (request(sampling=pb.SamplingParams(top_k=-5)), grpc.StatusCode.INVALID_ARGUMENT, "top_k"),
        (request(sampling=pb.SamplingParams(stop=["a"] * 5)), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
    ],
)
async def test_a_bad_grpc_request_is_refused_with_its_field(
    shared: tuple[Served, FakeWorker], message: pb.GenerateRequest, code: grpc.StatusCode, field: str
) -> None:
    served, worker = shared
    call = served.grpc.Generate(message)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            pass
    assert error.value.code() == code
    status = await rpc_status.aio.from_call(call)  # type: ignore[attr-defined]
    bad = BadRequest()
    assert status.details[0].Unpack(bad)
    assert bad.field_violations[0].field == field
    assert not worker.received("generate")


@settings(deadline=None)
@given(st.text(max_size=30), st.integers(0, 3))
def test_brackets_in_text_are_free_and_brackets_of_structure_are_counted(text: str, copies: int) -> None:
    content = json.dumps({"model": MODEL, "prompt": text * copies + "[{" * MAX_CONTAINERS}, ensure_ascii=False)
    check_structure(content.encode())
    with pytest.raises(InvalidRequest, match="arrays and objects"):
        check_structure(content.encode() + b"[" * MAX_CONTAINERS + b"{")
