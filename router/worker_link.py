"""The router's end of one worker address: dials, attaches, and dials again after every loss.

An address stays a member until the registry closes its link; a restarted worker comes back with a new worker_id.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

import grpc.aio

from baton.common.clock import Clock
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from router.worker_session import AttachCall, SessionObserver, WorkerSession

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 2.0
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),
)
_log = logging.getLogger("baton.router")


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Times in seconds."""

    router_id: str
    heartbeat_interval_s: float
    heartbeat_timeout_s: float


class LinkObserver(SessionObserver, Protocol):
    """Learns which sessions are attached: the registry."""

    def on_attached(self, session: WorkerSession) -> None: ...

    def on_lost(self, session: WorkerSession) -> None: ...


class WorkerLink:
    """One background task per address. `last_error` says why the worker is not attached, for the operator."""

    def __init__(self, address: str, settings: LinkSettings, observer: LinkObserver, clock: Clock) -> None:
        self.address = address
        self.last_error = "not dialled yet"
        self._settings = settings
        self._observer = observer
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_attached(), name=f"worker-link {self.address}")

    async def close(self) -> None:
        """End the session, if any; its attempts are told."""
        self._closed = True  # a cancel that meets the end of a dial can be lost; the next dial must not follow
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_attached(self) -> None:
        """A defect met in a session costs that session, not the address."""
        backoff_s = _FIRST_BACKOFF_S
        while not self._closed:
            try:
                attached = await self._attach_once()
            except Exception as defect:  # noqa: BLE001
                _log.error("a defect in the router ended the session with %s", self.address, exc_info=defect)
                self.last_error, attached = f"internal error: {defect!r}", False
            backoff_s = _FIRST_BACKOFF_S if attached else min(backoff_s * 2, _MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s)

    async def _attach_once(self) -> bool:
        """Dial and serve one session to its end. Returns whether the worker ever said hello."""
        async with grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS) as channel:
            call = pb_grpc.WorkerStub(channel).Attach(None)
            try:
                async with asyncio.timeout(self._settings.heartbeat_timeout_s):
                    hello = await self._greet(call)
            except TimeoutError:
                self.last_error = f"no hello within {self._settings.heartbeat_timeout_s:g} s"
            except grpc.aio.AioRpcError as error:
                self.last_error = f"{error.code().name}: {error.details()}"
            except ConnectionError as error:
                self.last_error = str(error)
            else:
                await self._serve(call, WorkerSession(self.address, hello, self._observer, self._clock))
                return True
            finally:
                call.cancel()
            return False

    async def _greet(self, call: AttachCall) -> pb.WorkerHello:
        settings = self._settings
        hello = pb.AttachHello(
            router_id=settings.router_id,
            heartbeat_interval_s=settings.heartbeat_interval_s,
            heartbeat_timeout_s=settings.heartbeat_timeout_s,
        )
        await call.write(pb.RouterFrame(hello=hello))
        return await _read_hello(call)

    async def _serve(self, call: AttachCall, session: WorkerSession) -> None:
        try:
            self._observer.on_attached(session)
            self.last_error = ""
            reason = await session.run(call, self._settings.heartbeat_interval_s, self._settings.heartbeat_timeout_s)
            self.last_error = reason
            _log.warning("worker %s at %s is lost: %s", session.worker_id, self.address, reason)
        finally:
            self._observer.on_lost(session)


async def _read_hello(call: AttachCall) -> pb.WorkerHello:
    frame = await call.read()
    if not isinstance(frame, pb.WorkerFrame) or frame.WhichOneof("frame") != "hello":
        raise ConnectionError("the worker's first frame is not a hello")
    return frame.hello
