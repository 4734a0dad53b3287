"""Cancels, disconnects and deadlines, in every state: no worker keeps a request that is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import httpx
import pytest

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.reader.pool import RequestReader
from tests.support.fake_worker import WAIT_S, FakeWorker, answer, emit
from tests.unit.router.asking import TOKENS, ask, kind_and_code, next_token_ids, num_held, request, token_ids, tokens_of
from tests.unit.router.conftest import MODEL, Served, serving


async def running_remote(served: Served, prefill: FakeWorker, decode: FakeWorker) -> tuple[Any, wpb.AttemptKey]:
    """A gRPC call whose hand-over is under way: its first token is out, decode knows it, too."""
    call = served.grpc.Generate(request(max_tokens=100))
    assert await next_token_ids(call) == TOKENS[:1]
    return call, prefill.received("prefill")[0].key


@pytest.fixture
async def remote(workers: list[FakeWorker]) -> AsyncIterator[Served]:
    workers.extend((FakeWorker("p0", "prefill", answer), FakeWorker("d0", "decode", answer)))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        yield served


async def both_are_told(served: Served, workers: list[FakeWorker], key: wpb.AttemptKey) -> None:
    for worker in workers:
        assert (await worker.next_frame("cancel")).key == key
    await served.until(lambda: served.router.dispatcher.is_idle)
    assert all(session.num_attempts == 0 for session in served.router.registry.sessions)


async def test_cancelling_the_grpc_call_frees_both_workers(workers: list[FakeWorker], remote: Served) -> None:
    call, key = await running_remote(remote, *workers)
    call.cancel()
    await both_are_told(remote, workers, key)


async def test_cancel_by_id_frees_both_workers_and_ends_the_stream(workers: list[FakeWorker], remote: Served) -> None:
    call, key = await running_remote(remote, *workers)
    assert (await remote.grpc.Cancel(pb.CancelRequest(request_id=key.request_id))).found
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert error.value.code() == grpc.StatusCode.CANCELLED
    await both_are_told(remote, workers, key)
    assert not (await remote.grpc.Cancel(pb.CancelRequest(request_id=key.request_id))).found
    record = await remote.record(key.request_id)
    assert record["error"].startswith("RequestCancelled")


async def test_a_grpc_deadline_frees_both_workers(workers: list[FakeWorker], remote: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await tokens_of(remote.grpc.Generate(request(max_tokens=100), timeout=0.5))
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    key = workers[0].received("prefill")[0].key
    assert workers[0].received("prefill")[0].spec.deadline_s <= 0.5
    await both_are_told(remote, workers, key)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_frees_both_workers(
    workers: list[FakeWorker], remote: Served, stream: bool
) -> None:
    async with httpx.AsyncClient(base_url=str(remote.http.base_url), timeout=10) as client:
        body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 100, "stream": stream}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        key = (await workers[0].next_frame("prefill")).key
        await remote.until(lambda: remote.router.recent.get(key.request_id).num_output_tokens == 1)  # type: ignore[union-attr]
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await both_are_told(remote, workers, key)


async def test_a_client_that_hangs_up_before_the_first_token_frees_the_worker(
    workers: list[FakeWorker], served: Served
) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    async with httpx.AsyncClient(base_url=str(served.http.base_url), timeout=10) as client:
        body = {"model": MODEL, "prompt": [1, 2, 3], "stream": True}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        key = (await workers[0].next_frame("generate")).key
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await both_are_told(served, workers, key)


@pytest.mark.parametrize(
    ("path", "method", "body"),
    [
        ("/v1/completions", "completion", {"prompt": "a"}),
        ("/v1/chat/completions", "chat", {"messages": []}),
        ("/tokenize", "to_tokenize", {"prompt": "a"}),
        ("/detokenize", "to_detokenize", {"tokens": [1]}),
    ],
)
async def test_a_client_that_hangs_up_while_its_request_is_read_ends_the_reading(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, method: str, body: dict[str, object]
) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def endless(_reader: RequestReader, _body: bytes) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr(RequestReader, method, endless)
    async with httpx.AsyncClient(base_url=str(served.http.base_url), timeout=10) as client:
        asking = asyncio.create_task(client.post(path, json={"model": MODEL, **body}))
        await asyncio.wait_for(began.wait(), WAIT_S)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await asyncio.wait_for(ended.wait(), WAIT_S)


async def test_a_client_that_hangs_up_while_queued_leaves_the_queue(workers: list[FakeWorker]) -> None:
    workers.append(FakeWorker("d0"))
    async with serving(router={"max_concurrent": 1}) as served:
        await served.attach(*workers)
        first = ask(served)
        await workers[0].next_frame("generate")
        call = served.grpc.Generate(request())
        await served.until(lambda: served.router.dispatcher.admission.queued == 1)
        call.cancel()
        await served.until(lambda: served.router.dispatcher.admission.queued == 0)
        first.cancel()
        await served.until(lambda: served.router.dispatcher.is_idle)
        assert served.router.dispatcher.admission.running == 0
        assert len(workers[0].received("generate")) == 1


async def test_the_request_timeout_is_a_504_and_frees_the_worker(workers: list[FakeWorker]) -> None:
    workers.append(FakeWorker("d0"))
    async with serving(server={"request_timeout_s": 0.3}) as served:
        await served.attach(*workers)
        response = await ask(served)
        assert response.status_code == 504
        assert kind_and_code(response) == ("server_error", "timeout")
        await both_are_told(served, workers, workers[0].received("generate")[0].key)


async def test_a_cancel_while_decode_reserves_reaches_decode_only(workers: list[FakeWorker]) -> None:
    decode, prefill = FakeWorker("d0", "decode"), FakeWorker("p0", "prefill", answer)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        call = served.grpc.Generate(request())
        key = (await decode.next_frame("open")).key
        call.cancel()
        assert (await decode.next_frame("cancel")).key == key
        decode.say(reserved=wpb.Reserved(key=key, lease=1, generation=1))
        await served.until(lambda: served.router.metrics.registry.get_sample_value("baton_fenced_frames_total") == 1)
        assert not prefill.received("prefill")
        assert not prefill.received("cancel")


@pytest.mark.parametrize("decode_first", [False, True])
async def test_a_finished_request_cancels_nobody(workers: list[FakeWorker], remote: Served, decode_first: bool) -> None:
    """Whichever worker's frames arrive first."""
    prefill, decode = workers
    prefill.script = None
    answering = ask(remote)
    command = await prefill.next_frame("prefill")
    if decode_first:
        emit(decode, command.key, command.spec, 1, 8)
        await remote.until(lambda: num_held(remote) == 7)
        emit(prefill, command.key, command.spec, 0, 1)
    else:
        emit(prefill, command.key, command.spec, 0, 1)
        await remote.until(lambda: remote.router.recent.get(command.key.request_id).num_output_tokens == 1)  # type: ignore[union-attr]
        emit(decode, command.key, command.spec, 1, 8)
    assert token_ids(await answering) == TOKENS
    await remote.until(lambda: remote.router.dispatcher.is_idle)
    await asyncio.gather(*(told_in_order(worker) for worker in workers))
    assert not prefill.received("cancel")
    assert not decode.received("cancel")


async def told_in_order(worker: FakeWorker) -> None:
    """Returns when the worker has heard what was sent before now: the next heartbeat comes after it."""
    heard = worker.num_router_heartbeats
    async with asyncio.timeout(30):
        while worker.num_router_heartbeats < heard + 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
