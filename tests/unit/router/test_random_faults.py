"""Random workers and random clients: tokens are right, and nothing stays behind in the router or on a worker.

A worker answers, answers in part and fails, refuses, says everything twice, or hangs up; a client reads to the end or
leaves at some time. What a complete stream says follows from its prompt alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random

import httpx
import pytest

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from tests.support.fake_worker import FakeWorker, emit, expected_tokens
from tests.unit.router.conftest import MODEL, Served, serving

FAILURES = ("peer_lost", "corrupt", "expired", "aborted", "internal")
REFUSALS = ("busy", "no_connection", "unknown_lease")
CLIENTS = 24
PATIENCE_S = 100.0


class Fickle:
    """The script of all workers of a run; `decoders` by id, since a prefill worker's peers are named in commands.

    `ended` has the worker and key of attempts that a worker knows to be over.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.decoders: dict[str, FakeWorker] = {}
        self.ended: set[tuple[str, str, int]] = set()

    def __call__(self, worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        kind = frame.WhichOneof("frame")
        if kind == "connect_peer":
            worker.say(peer_state=wpb.PeerState(worker_id=frame.connect_peer.worker_id, state="connected"))
        elif kind == "open":
            self._open(worker, frame.open.key)
        elif kind == "generate":
            self._tokens(worker, frame.generate.key, frame.generate.spec, 0)
        elif kind == "prefill":
            self._prefill(worker, frame.prefill)

    def not_ended(self, worker: FakeWorker) -> set[tuple[str, str, int]]:
        """Attempts that a worker was told of on its last stream and would keep: nobody has ended or cancelled them."""
        kept: set[tuple[str, str, int]] = set()
        for frame in worker.frames:
            kind = frame.WhichOneof("frame")
            if kind == "hello":
                kept.clear()
            elif kind == "cancel":
                kept.discard(name_of(worker, frame.cancel.key))
            elif kind in ("open", "generate", "prefill"):
                kept.add(name_of(worker, getattr(frame, kind).key))
        return kept - self.ended

    def _open(self, worker: FakeWorker, key: wpb.AttemptKey) -> None:
        if self.rng.random() < 0.2:
            self._refuse(worker, key, "busy")
        else:
            for _ in range(self.rng.choice((1, 1, 2))):
                worker.say(reserved=wpb.Reserved(key=key, lease=1, generation=1))

    def _prefill(self, worker: FakeWorker, command: wpb.PrefillCommand) -> None:
        if self.rng.random() < 0.15:
            self._refuse(worker, command.key, self.rng.choice(REFUSALS))
            return
        speakers = [(worker, 0, 1), (self.decoders[command.decode_worker_id], 1, command.spec.max_tokens)]
        self.rng.shuffle(speakers)
        for speaker, start, stop in speakers:
            if start == 0:
                emit(speaker, command.key, command.spec, 0, 1)
            elif stop > 1 and self._tokens(speaker, command.key, command.spec, start):
                self.ended.add(name_of(worker, command.key))  # what decode says shows that the hand-over is complete
        if command.spec.max_tokens == 1:
            self.ended.add(name_of(worker, command.key))

    def _refuse(self, worker: FakeWorker, key: wpb.AttemptKey, code: str) -> None:
        self.ended.add(name_of(worker, key))
        worker.say(refused=wpb.Refused(key=key, code=code, message="no", retry_after_s=0.01))

    def _tokens(self, worker: FakeWorker, key: wpb.AttemptKey, spec: wpb.RequestSpec, start: int) -> int:
        """Some or all of them, some of them twice; a part is followed by a failure or by the end of the stream.

        Returns how many.
        """
        rng = self.rng
        stop = spec.max_tokens if rng.random() < 0.6 else rng.randint(start, spec.max_tokens)
        emit(worker, key, spec, start, stop)
        if stop > start and rng.random() < 0.3:
            emit(worker, key, spec, start, rng.randint(start, stop))
        if stop == spec.max_tokens:
            self.ended.add(name_of(worker, key))
        elif rng.random() < 0.8:
            self.ended.add(name_of(worker, key))
            worker.say(failed=wpb.AttemptFailed(key=key, code=rng.choice(FAILURES), message="x", retryable=True))
        else:
            worker.hang_up()
        return stop - start


def name_of(worker: FakeWorker, key: wpb.AttemptKey) -> tuple[str, str, int]:
    return worker.hello.worker_id, key.request_id, key.attempt


async def one_client(served: Served, rng: random.Random) -> str:
    """What became of the request: "complete", "left", or the error."""
    prompt = [rng.randrange(200) for _ in range(rng.randint(1, 40))]
    max_tokens, n = rng.randint(1, 12), rng.choice((1, 1, 1, 3))
    patience_s = rng.uniform(0.0, 0.2) if rng.random() < 0.3 else PATIENCE_S
    expected = [expected_tokens(len(prompt), max_tokens)] * n
    ask = rng.choice((over_grpc, over_http))
    said: list[list[int]] = [[] for _ in range(n)]
    try:
        async with asyncio.timeout(patience_s):
            error = await ask(served, prompt, max_tokens, said, rng.random() < 0.5)
    except TimeoutError:
        assert patience_s < PATIENCE_S, "a request hangs"
        error = "left"
    assert all(tokens == whole[: len(tokens)] for tokens, whole in zip(said, expected, strict=True))
    assert error or said == expected
    return error or "complete"


async def over_grpc(served: Served, prompt: list[int], max_tokens: int, said: list[list[int]], _: bool) -> str:
    request = pb.GenerateRequest(
        model=MODEL,
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(max_tokens=max_tokens, n=len(said), ignore_eos=True),
        return_token_ids=True,
    )
    call = served.grpc.Generate(request)
    try:
        while isinstance(response := await call.read(), pb.GenerateResponse):
            said[response.index] += response.token_ids
    finally:
        call.cancel()
    return "" if int((await call.code()).value[0]) == 0 else str(await call.details())


async def over_http(served: Served, prompt: list[int], max_tokens: int, said: list[list[int]], stream: bool) -> str:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "n": len(said), "stream": stream}
    body |= {"return_token_ids": True, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=str(served.http.base_url), timeout=PATIENCE_S) as client:
        if not stream:
            content = (await client.post("/v1/completions", json=body)).json()
            for choice in content.get("choices", ()):
                said[choice["index"]] += choice["token_ids"]
            return str(content.get("error", ""))
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                with contextlib.suppress(ValueError):
                    content = json.loads(line.removeprefix("data: "))
                    for choice in content.get("choices", ()):
                        said[choice["index"]] += choice["token_ids"]
                    if error := content.get("error"):
                        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(6))
async def test_nothing_is_wrong_and_nothing_stays_behind(workers: list[FakeWorker], seed: int) -> None:
    rng = random.Random(seed)
    script = Fickle(rng)
    workers.extend(FakeWorker(f"p{number}", "prefill", script) for number in range(2))
    workers.extend(FakeWorker(f"d{number}", "decode", script) for number in range(2))
    script.decoders = {worker.hello.worker_id: worker for worker in workers if worker.hello.role == "decode"}
    limits = {"policy": "remote", "max_concurrent": 8, "max_attempts": 12}
    async with serving(router=limits) as served:
        await served.attach(*workers)
        ended = await asyncio.gather(*(one_client(served, rng) for _ in range(CLIENTS)))
        assert "complete" in ended
        assert {"left", "complete"} >= set(ended)
        dispatcher, registry = served.router.dispatcher, served.router.registry
        await served.until(lambda: dispatcher.is_idle and len(registry.sessions) == len(workers))
        assert (dispatcher.admission.running, dispatcher.admission.queued) == (0, 0)
        assert not dispatcher.placement._line._tickets
        for session in registry.sessions:
            assert (session.num_attempts, session.snapshot().queued_prefill_tokens) == (0, 0)
        assert not any(pair.probing for pair in registry.pairs.all())
        for worker in workers:
            await served.until(lambda worker=worker: not script.not_ended(worker))  # type: ignore[misc]
