"""How tests ask a router over HTTP and gRPC, and what a healthy worker answers. Shared by the tests of its faults."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from tests.support.fake_worker import FakeWorker, answer, expected_tokens
from tests.unit.router.conftest import MODEL, Served

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


def only_connect(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
    if frame.HasField("connect_peer"):
        answer(worker, frame)


def num_held(served: Served) -> int:
    """Tokens that wait in fences for those before them."""
    generations = served.router.dispatcher._generations.values()
    return sum(g._attempt._fence.num_waiting for g in generations if g._attempt is not None)
