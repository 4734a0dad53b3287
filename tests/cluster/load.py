"""Mixed load on a running server: completions over HTTP and gRPC at a fixed concurrency, with their answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import grpc
import httpx

from protos import inference_pb2, inference_pb2_grpc


@dataclass(frozen=True, slots=True)
class Job:
    """One request of the load. temperature 0 is greedy."""

    transport: Literal["http", "http-stream", "grpc"]
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `path` is "local" or "remote"."""

    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    path: str


def mixed_jobs(count: int, seed: int, vocab_size: int = 256, max_prompt: int = 200, max_tokens: int = 40) -> list[Job]:
    """Random prompts of 1 to `max_prompt` tokens, some of them sharing a prefix, a quarter of them sampled."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(vocab_size) for _ in range(max_prompt // 2))
    jobs = []
    for index in range(count):
        length = rng.choice((1, 15, 16, 17, rng.randint(1, max_prompt)))
        prompt = tuple(rng.randrange(vocab_size) for _ in range(length))
        if index % 5 == 0:
            prompt = shared + prompt[: max_prompt // 2]
        transport: Literal["http", "http-stream", "grpc"] = ("http", "http-stream", "grpc")[index % 3]
        temperature = 0.9 if index % 4 == 3 else 0.0
        jobs.append(Job(transport, prompt, rng.randint(1, max_tokens), temperature, rng.randrange(2**32)))
    return jobs


async def run_jobs(
    url: str, grpc_target: str, model: str, jobs: Sequence[Job], concurrency: int, timeout_s: float = 120.0
) -> list[Answer]:
    """Answers in the order of the jobs. Any failed request raises."""
    gate = asyncio.Semaphore(concurrency)
    async with (
        httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=httpx.Limits(max_connections=concurrency)) as http,
        grpc.aio.insecure_channel(grpc_target) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def one(job: Job) -> Answer:
            async with gate:
                if job.transport == "grpc":
                    return await _over_grpc(stub, model, job, timeout_s)
                if job.transport == "http":
                    return await _over_http(http, model, job)
                return await _over_http_stream(http, model, job)

        return list(await asyncio.gather(*(one(job) for job in jobs)))


def _body(model: str, job: Job, stream: bool) -> dict[str, object]:
    body: dict[str, object] = {
        "model": model,
        "prompt": list(job.prompt),
        "max_tokens": job.max_tokens,
        "temperature": job.temperature,
        "seed": job.seed,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    return body


async def _over_http(http: httpx.AsyncClient, model: str, job: Job) -> Answer:
    response = await http.post("/v1/completions", json=_body(model, job, stream=False))
    assert response.status_code == 200, response.text
    content = response.json()
    (choice,) = content["choices"]
    return Answer(
        tuple(choice["token_ids"]),
        choice["finish_reason"],
        content["usage"]["prompt_tokens"],
        content["usage"]["completion_tokens"],
        response.headers["x-baton-path"].split(";")[0],
    )


async def _over_http_stream(http: httpx.AsyncClient, model: str, job: Job) -> Answer:
    token_ids: list[int] = []
    finish_reason, usage = "", {"prompt_tokens": -1, "completion_tokens": -1}
    async with http.stream("POST", "/v1/completions", json=_body(model, job, stream=True)) as response:
        assert response.status_code == 200, await response.aread()
        path = response.headers["x-baton-path"].split(";")[0]
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                token_ids += choice.get("token_ids") or []
                finish_reason = choice["finish_reason"] or finish_reason
            usage = chunk.get("usage") or usage
    return Answer(tuple(token_ids), finish_reason, usage["prompt_tokens"], usage["completion_tokens"], path)


async def _over_grpc(stub: inference_pb2_grpc.InferenceAsyncStub, model: str, job: Job, timeout_s: float) -> Answer:
    request = inference_pb2.GenerateRequest(
        model=model,
        token_ids=inference_pb2.TokenIds(ids=job.prompt),
        sampling=inference_pb2.SamplingParams(
            max_tokens=job.max_tokens, temperature=job.temperature, seed=job.seed, ignore_eos=True
        ),
        return_token_ids=True,
    )
    token_ids: list[int] = []
    last = inference_pb2.GenerateResponse()
    async for response in stub.Generate(request, timeout=timeout_s):
        token_ids += response.token_ids
        last = response
    return Answer(
        tuple(token_ids), last.finish_reason, last.usage.prompt_tokens, last.usage.completion_tokens, last.path
    )
