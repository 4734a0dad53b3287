"""The router as a process: health, readiness, draining, ports, slow clients, what it imports."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import router.generation
import router.http_protocol
from baton.common.clock import ManualClock
from baton.common.config import BatonConfig
from baton.common.errors import ConfigError
from baton.common.sampling import SamplingParams
from router.event_stream import EventStream
from router.http_protocol import BoundedH11Protocol
from router.server import Router
from router.types import GenerationRequest, ReaderTooSlow, TokenEvent
from tests.support.fake_worker import FakeWorker, answer, emit, expected_tokens
from tests.unit.router.conftest import MODEL, Served, byte_tokenizer, serving

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_ready_only_with_a_decode_worker_and_healthy_always(workers: list[FakeWorker], served: Served) -> None:
    workers.extend((FakeWorker("p0", "prefill", answer), FakeWorker("d0", "decode", answer)))
    assert (await served.http.get("/ready")).status_code == 503
    await served.attach(workers[0])
    assert (await served.http.get("/ready")).status_code == 503
    await served.attach(*workers)
    assert (await served.http.get("/ready")).status_code == 200
    await workers[1].kill()
    await served.until(lambda: not served.router.registry.is_ready)
    assert (await served.http.get("/ready")).status_code == 503
    assert (await served.http.get("/health")).status_code == 200


async def test_health_is_progress_or_idleness(workers: list[FakeWorker]) -> None:
    """A request on which nothing moves makes the router stuck; a step of a worker or a token makes it healthy again."""
    clock = ManualClock(1000.0)
    workers.append(FakeWorker("d0"))
    async with serving(clock) as served:

        async def health_after(seconds: float) -> int:
            clock.advance(seconds)
            return (await served.http.get("/health")).status_code

        await served.attach(*workers)
        assert await health_after(100.0) == 200
        asking = asyncio.create_task(served.complete(max_tokens=3))
        command = await workers[0].next_frame("generate")
        assert await health_after(29.0) == 200
        assert await health_after(2.0) == 503
        workers[0].beat.steps = 7
        await served.until(lambda: served.router.registry.last_step_at == clock.now())
        assert await health_after(29.0) == 200
        assert await health_after(2.0) == 503
        emit(workers[0], command.key, command.spec, 0, 1)
        await served.until(lambda: served.router.dispatcher.last_progress_at == clock.now())
        assert await health_after(29.0) == 200
        emit(workers[0], command.key, command.spec, 1, 3)
        await asking
        await served.until(lambda: served.router.dispatcher.is_idle)
        assert await health_after(1000.0) == 200


async def test_the_standard_grpc_health_and_reflection_services(workers: list[FakeWorker], served: Served) -> None:
    target = f"127.0.0.1:{served.router.grpc_port}"
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Inference"))
        assert (await watch.read()).status == NOT_SERVING
        workers.append(FakeWorker("d0"))
        await served.attach(*workers)
        assert (await watch.read()).status == SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        services = (await call.read()).list_services_response.service
        assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= {service.name for service in services}
        watch.cancel()


async def test_draining_refuses_new_requests_and_finishes_the_running_ones(
    workers: list[FakeWorker], served: Served
) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    running = asyncio.create_task(served.complete(max_tokens=3, return_token_ids=True))
    command = await workers[0].next_frame("generate")
    draining = asyncio.create_task(served.router.drain(10.0))
    await served.until(lambda: served.router.dispatcher.draining)
    assert (await served.complete()).status_code == 503
    assert (await served.http.get("/ready")).status_code == 503
    emit(workers[0], command.key, command.spec, 0, 3)
    assert (await running).json()["choices"][0]["token_ids"] == expected_tokens(3, 3)
    await draining


async def test_what_does_not_finish_while_draining_is_cancelled(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    running = asyncio.create_task(served.complete(max_tokens=3))
    key = (await workers[0].next_frame("generate")).key
    await served.router.drain(0.05)
    assert (await workers[0].next_frame("cancel")).key == key
    assert (await running).status_code == 503


async def test_stopping_leaves_no_task_and_no_listener(workers: list[FakeWorker]) -> None:
    before = asyncio.all_tasks()
    workers.append(FakeWorker("d0", script=answer))
    async with serving() as served:
        await served.attach(*workers)
        await served.complete()
        ports = {served.router.http_port, served.router.grpc_port}
        listening = {
            (c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
            for c in psutil.Process().net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr.port in ports
        }
        assert listening == {("127.0.0.1", port) for port in ports}
    await workers[0].kill()
    open_ports = {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert not ports & open_ports
    left = {task.get_name() for task in asyncio.all_tasks() - before if not task.done()}
    assert not {name for name in left if "link" in name or "server" in name or "health" in name}


@pytest.mark.parametrize("key", ["port", "grpc_port"])
async def test_a_taken_port_is_a_configuration_error(key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = {"port": 0, "grpc_port": 0, key: taken.getsockname()[1]}
        config = BatonConfig.model_validate({"model": MODEL, "server": server})
        broken = Router(config, byte_tokenizer())
        with pytest.raises(ConfigError, match=f"server.{key}"):
            await broken.start()
        await broken.stop()


async def test_a_reader_that_never_reads_is_cut_off_and_the_worker_freed(
    workers: list[FakeWorker], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.generation, "MAX_UNREAD_TOKENS", 4)
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    request = GenerationRequest("slow", (1, 2, 3), SamplingParams(max_tokens=100), 60.0)
    generation = served.router.dispatcher.submit(request)
    command = await workers[0].next_frame("generate")
    emit(workers[0], command.key, command.spec, 0, 6)
    assert (await workers[0].next_frame("cancel")).key == command.key
    assert await anext(generation) == TokenEvent(tuple(expected_tokens(3, 5)))
    with pytest.raises(ReaderTooSlow):
        await anext(generation)


@pytest.mark.parametrize("stalls", [True, False])
async def test_a_client_that_reads_nothing_is_cut_off_and_one_that_reads_slowly_is_not(
    served: Served, monkeypatch: pytest.MonkeyPatch, stalls: bool
) -> None:
    """It asks for more than all buffers hold, pipelined, so that the server cannot write the rest."""
    monkeypatch.setattr(router.http_protocol, "STALLED_CLIENT_S", 0.3 if stalls else 1.0)
    connections = served.router._http.server_state.connections
    with socket.create_connection(("127.0.0.1", served.router.http_port)) as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 500)
        await served.until(
            lambda: any(isinstance(one, BoundedH11Protocol) and one.flow.write_paused for one in connections)
        )
        if stalls:
            await served.until(lambda: not connections)
            return
        for _ in range(15):
            assert await loop.sock_recv(client, 1 << 20)
            await asyncio.sleep(0.1)
        assert connections


def is_write_paused(connection: object) -> bool:
    assert isinstance(connection, BoundedH11Protocol)
    return connection.flow.write_paused


async def test_an_event_stream_that_never_started_is_ended_too() -> None:
    ended = asyncio.Event()

    async def events() -> AsyncGenerator[str, None]:
        yield "x"

    async def send(message: Any) -> None:
        raise OSError

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    await EventStream(events(), {}, ended.set)({"type": "http"}, receive, send)
    assert ended.is_set()


async def test_a_huge_header_is_refused(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.router.http_port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nx-huge: " + b"a" * 1_000_000)
    assert b" 400 " in await asyncio.wait_for(reader.readline(), 30)
    writer.close()


def test_the_router_needs_neither_torch_nor_ray() -> None:
    code = "import sys, router.server; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


async def test_every_reference_of_the_openapi_document_resolves(served: Served) -> None:
    document = (await served.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for path, required in (("/v1/completions", {"model", "prompt"}), ("/v1/chat/completions", {"model", "messages"})):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert required <= set(schemas[body["$ref"].rpartition("/")[2]]["required"])

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [ref for value in node.values() for ref in references(value)]
        return [ref for value in node for ref in references(value)] if isinstance(node, list) else []

    assert references(document)
    for reference in references(document):
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
