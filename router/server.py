"""The router as a whole: HTTP and gRPC servers around one dispatcher, in the current event loop.

Made and stopped by the process that runs the cluster (baton.cluster); it installs no signal handlers.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import uvicorn
from fastapi import FastAPI
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]
from grpc_reflection.v1alpha import reflection

from baton.common.clock import Clock, MonotonicClock
from baton.common.config import BatonConfig
from baton.common.errors import ConfigError
from protos import inference_pb2, inference_pb2_grpc
from router.app import Services, build_app
from router.chat_templates import ChatTemplates
from router.completions import Completions
from router.dispatcher import Dispatcher
from router.grpc_service import InferenceService
from router.health import is_ready
from router.http_protocol import BoundedH11Protocol
from router.metrics import Metrics
from router.reader.pool import RequestReader
from router.record import RecentRequests
from router.registry import Registry
from router.sampling_defaults import SamplingDefaults
from router.submitter import Submitter
from router.tokenizer import Tokenizer
from router.worker_link import LinkSettings

_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_HEADER_BYTES = 16 * 1024  # h11 takes 1 ms per kilobyte of short lines
_METADATA_BYTES = 64 * 1024
_SHUTDOWN_S = 5
_GRPC_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_concurrent_streams", 4096),
    ("grpc.max_metadata_size", _METADATA_BYTES),
)


class Router:
    """`registry` takes the members. `http_port` and `grpc_port` are the real ports once started.

    Raises ConfigError from the constructor when the model's tokenizer cannot be read, and from `start` when an address
    cannot be bound.
    """

    def __init__(
        self,
        config: BatonConfig,
        tokenizer: Tokenizer | None = None,
        clock: Clock | None = None,
        chat_templates: ChatTemplates | None = None,
    ) -> None:
        self.http_port = 0
        self.grpc_port = 0
        self._config = config
        clock = clock or MonotonicClock()
        tokenizer = tokenizer or Tokenizer.load(Path(config.model))
        self.metrics = Metrics()
        self.recent = RecentRequests(config.router.recent_requests)
        self.registry = Registry(_link_settings(config), self.recent, self.metrics, clock)
        self.dispatcher = Dispatcher(config.router, self.registry, self.recent, self.metrics, clock)
        submitter = Submitter(
            self.dispatcher, tokenizer, config.model_name, config.server.request_timeout_s, _sampling_defaults(config)
        )
        completions = Completions(submitter)
        self.reader = RequestReader(chat_templates or ChatTemplates.load(Path(config.model), config.chat_template))
        services = Services(self.reader, submitter, completions, self.dispatcher, self.registry)
        self._http = _HttpServer(_uvicorn_config(build_app(services, config.server.max_body_bytes)))
        self._http_task: asyncio.Task[None] | None = None
        self._inference = InferenceService(submitter, completions)
        self._grpc_health = health_aio.HealthServicer()
        self._grpc: grpc.aio.Server | None = None
        self._ready_changed = asyncio.Event()
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen on both ports; returns when clients can connect."""
        server = self._config.server
        listener = _listen(server.host, server.port)
        self.http_port = listener.getsockname()[1]
        self.registry.start()
        self._grpc = self._build_grpc()
        try:
            self.grpc_port = self._grpc.add_insecure_port(_target(server.host, server.grpc_port))
        except RuntimeError:
            listener.close()
            raise ConfigError("server.grpc_port", f"cannot listen on {server.host}:{server.grpc_port}") from None
        await self._grpc.start()
        self._http_task = asyncio.create_task(self._http.serve(sockets=[listener]), name="http-server")
        await self._http.listening.wait()
        self.registry.subscribe(self._ready_changed.set)
        self._health_task = asyncio.create_task(self._report_health(), name="grpc-health")
        self.reader.start()

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109
        """Refuse new requests, wait for running ones, then cancel what is left."""
        self._ready_changed.set()
        await self.dispatcher.drain(timeout)

    async def stop(self) -> None:
        """Cancel what runs, let go of all workers and close both ports. May be called at any time, also twice."""
        await self.dispatcher.drain(0)
        await self.registry.close()
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.gather(self._health_task, return_exceptions=True)
        if self._grpc is not None:
            await self._grpc.stop(grace=1.0)
        if self._http_task is not None:
            self._http.should_exit = True
            await self._http_task
        await self.reader.close()

    def _build_grpc(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=[*_GRPC_OPTIONS, *_message_limit(self._config.server.max_body_bytes)])
        inference_pb2_grpc.add_InferenceServicer_to_server(self._inference, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._grpc_health, server)
        names = (_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    async def _report_health(self) -> None:
        """The standard health service says what /ready says."""
        reported = None
        while True:
            ready = is_ready(self.dispatcher, self.registry)
            if ready != reported:
                serving = health_pb2.HealthCheckResponse.ServingStatus
                status = serving.SERVING if ready else serving.NOT_SERVING
                for service in ("", _SERVICE):
                    await self._grpc_health.set(service, status)
                reported = ready
            await self._ready_changed.wait()
            self._ready_changed.clear()


class _HttpServer(uvicorn.Server):
    """uvicorn without signal handlers, and with an event for "listening"."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


def _uvicorn_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedH11Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )


def _sampling_defaults(config: BatonConfig) -> SamplingDefaults:
    return SamplingDefaults() if config.generation_config == "none" else SamplingDefaults.load(Path(config.model))


def _link_settings(config: BatonConfig) -> LinkSettings:
    router = config.router
    return LinkSettings(secrets.token_hex(8), router.heartbeat_interval_s, router.heartbeat_timeout_s)


def _message_limit(max_bytes: int) -> list[tuple[str, int]]:
    return [("grpc.max_receive_message_length", max_bytes)]


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket on `host` only. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError("server.host", f"{host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError("server.port", f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def _target(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
