"""The load of a chaos run: streamed completions with token ids over HTTP, and what each client saw of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import httpx

from baton.chaos.plan import LoadPlan
from baton.common.errors import BatonError

_NUM_TOP = 2
_RETRY_S = 1.0
_STOPS = tuple("abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True, slots=True)
class Job:
    """One request. `temperature` 0 is greedy. `cancel_after`: its client disconnects after so many tokens."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    cancel_after: int | None = None


@dataclass(slots=True)
class Stream:
    """What a client saw of its request. Times are those of `time.monotonic`; `arrivals` has one per chunk with tokens.

    `error` is empty for a stream that ended as it should, also when its own client ended it (`cancelled`).
    `prompt_tokens` and `completion_tokens` are the usage.
    """

    job: Job
    started_at: float
    request_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = -1
    completion_tokens: int = -1
    num_refused: int = 0
    cancelled: bool = False
    error: str = ""
    ended_at: float = 0.0


class StreamBroken(BatonError):
    """The server ended a stream with an error, or not as the protocol says."""


class ComeAgain(BatonError):
    """The server refused for now."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"refused, retry after {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


class Jobs:
    """An endless supply of random jobs, the same for the same seed. Every fifth prompt begins as another one did."""

    def __init__(self, plan: LoadPlan, seed: int, vocab_size: int) -> None:
        self._plan = plan
        self._rng = random.Random(f"jobs {seed}")
        self._vocab_size = vocab_size
        self._shared = self._tokens(plan.prompt_tokens[1])

    def next(self) -> Job:
        rng, plan = self._rng, self._plan
        length = rng.randint(*plan.prompt_tokens)
        prompt = self._tokens(length)
        if rng.random() < 0.2:
            prompt = self._shared[: length // 2] + prompt[length // 2 :]
        temperature = 0.9 if rng.random() < plan.sampled else 0.0
        max_tokens, seed = rng.randint(*plan.output_tokens), rng.getrandbits(63)
        stop = tuple(rng.sample(_STOPS, 3)) if rng.random() < plan.with_stop else ()
        logprobs = rng.random() < plan.with_logprobs
        cancel_after = rng.randint(1, max_tokens) if rng.random() < plan.cancelled else None
        return Job(prompt, max_tokens, temperature, seed, stop, logprobs, cancel_after)

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(self._vocab_size) for _ in range(count))


class Client:
    """Streams jobs to one server. `model` is its name in the API."""

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        self._model = model
        self._timeout_s = timeout_s
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits)

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, job: Job) -> Stream:
        """The whole stream of a job."""
        stream = Stream(job, time.monotonic())
        await self.fill(stream)
        return stream

    async def fill(self, stream: Stream) -> None:
        """Send the stream's job and take what comes; a refusal (429) is tried again when the server says so."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._until_accepted(stream)
        except TimeoutError:
            stream.error = f"not complete after {self._timeout_s:g} s"
        except (httpx.HTTPError, StreamBroken, ValueError, KeyError, TypeError) as error:  # the last: no such chunk
            stream.error = f"{type(error).__name__}: {error}"
        stream.ended_at = time.monotonic()

    async def _until_accepted(self, stream: Stream) -> None:
        while True:
            try:
                async with contextlib.aclosing(self.chunks(stream.job)) as chunks:
                    async for chunk in chunks:
                        _take(stream, chunk)
                        if len(stream.token_ids) >= (stream.job.cancel_after or math.inf):
                            stream.cancelled = True
                            return
                return
            except ComeAgain as refusal:
                stream.num_refused += 1
                await asyncio.sleep(refusal.retry_after_s)

    async def chunks(self, job: Job) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of one try. Raises StreamBroken or ComeAgain; whoever closes it early disconnects."""
        async with self._http.stream("POST", "/v1/completions", json=self._body(job)) as response:
            if response.status_code == 429:
                raise ComeAgain(float(response.headers.get("retry-after", _RETRY_S)))
            if response.status_code != 200:
                raise StreamBroken(f"status {response.status_code}: {(await response.aread()).decode()}")
            async for event in _events(response):
                if event == b"[DONE]":
                    return
                yield json.loads(event)
        raise StreamBroken("the stream ended without its last event")

    def _body(self, job: Job) -> dict[str, object]:
        optional: dict[str, object] = {"stop": list(job.stop)} if job.stop else {}
        if job.logprobs:
            optional["logprobs"] = _NUM_TOP
        return optional | {
            "model": self._model,
            "prompt": list(job.prompt),
            "max_tokens": job.max_tokens,
            "temperature": job.temperature,
            "seed": job.seed,
            "top_p": 1.0,
            "top_k": -1,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def _events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events. By hand: httpx would also break lines at characters within the text."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ")


def _take(stream: Stream, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        raise StreamBroken(json.dumps(chunk["error"]))
    stream.request_id = chunk["id"]
    for choice in chunk["choices"]:
        if choice["token_ids"]:
            stream.token_ids += choice["token_ids"]
            stream.arrivals.append(time.monotonic())
        if choice["logprobs"] is not None:
            stream.logprobs += choice["logprobs"]["token_logprobs"]
            stream.top_logprobs += choice["logprobs"]["top_logprobs"]
        stream.text += choice["text"]
        stream.finish_reason = choice["finish_reason"] or stream.finish_reason
    if usage := chunk.get("usage"):
        stream.prompt_tokens, stream.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]


async def run_load(client: Client, plan: LoadPlan, jobs: Jobs, streams: list[Stream]) -> None:
    """Keep `plan.concurrency` clients busy until the load is complete; `streams` grows as requests end."""
    start, num_sent = time.monotonic(), 0

    async def one_client() -> None:
        nonlocal num_sent
        while num_sent < plan.requests or time.monotonic() < start + plan.duration_s:
            num_sent += 1
            streams.append(await client.run(jobs.next()))
            await asyncio.sleep(plan.think_s)

    async with asyncio.TaskGroup() as clients:
        for _ in range(plan.concurrency):
            clients.create_task(one_client())
