"""Serves `Worker.Attach`: one bidirectional stream per router, and the router's lease on this worker.

Asyncio thread. The stream's end, for whatever reason, withdraws everything that its router asked for.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from baton.worker.attempts import Attempts
from baton.worker.chaos_hooks import Injector
from baton.worker.commands import CommandDispatcher
from baton.worker.half import Half
from baton.worker.session import RouterSession
from baton.worker.streams import SilenceWatch, repeat, run_until_first
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerServicer

logger = logging.getLogger(__name__)
HELLO_TIMEOUT_S = 5.0
MIN_INTERVAL_S, MAX_TIMEOUT_S = 0.01, 600.0


class AttachService(WorkerServicer):
    """`hello` introduces the worker, `heartbeat(sequence)` its present state; `injector` disturbs streams in tests."""

    def __init__(
        self,
        dispatcher: CommandDispatcher,
        attempts: Attempts,
        halves: list[Half],
        hello: pb.WorkerHello,
        heartbeat: Callable[[int], pb.WorkerHeartbeat],
        injector: Injector,
    ) -> None:
        self._dispatcher = dispatcher
        self._attempts = attempts
        self._halves = halves
        self._hello = hello
        self._heartbeat = heartbeat
        self._injector = injector
        self._numbers = itertools.count(1)
        self._sessions: dict[str, RouterSession] = {}

    async def Attach(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """A coroutine instead of a generator: gRPC then cancels it at once when the stream breaks."""
        frames = aiter(request_iterator)
        hello = await self._read_hello(frames, context)
        session = self._open(hello.router_id)
        reason = "the stream broke"
        try:
            reason = await self._run(session, hello, frames, context)
        except grpc.RpcError as error:
            reason = f"the stream broke: {error}"
        finally:
            self._close(session, reason)

    def end_all(self, reason: str) -> None:
        """Let every stream send what is queued and end."""
        for session in self._sessions.values():
            session.outbox.end(reason)

    async def _read_hello(self, frames: AsyncIterator[pb.RouterFrame], context: Any) -> pb.AttachHello:
        try:
            first = await asyncio.wait_for(anext(frames), HELLO_TIMEOUT_S)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the stream did not begin with a hello")
        problem = _problem_with(first)
        if problem is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        return first.hello

    def _open(self, router_id: str) -> RouterSession:
        """A router has one stream: its older one, if any is left, ends."""
        older = self._sessions.get(router_id)
        if older is not None:
            older.outbox.end("the router attached again")
            self._withdraw(older)
        session = RouterSession(next(self._numbers), router_id)
        self._sessions[router_id] = session
        session.send(pb.WorkerFrame(hello=self._hello))
        for half in self._halves:
            half.on_router_attached(session)
        logger.info("router %s attached", router_id)
        return session

    async def _run(
        self, session: RouterSession, hello: pb.AttachHello, frames: AsyncIterator[pb.RouterFrame], context: Any
    ) -> str:
        watch = SilenceWatch(hello.heartbeat_timeout_s)
        sequence = itertools.count()

        def beat() -> None:
            session.send(pb.WorkerFrame(heartbeat=self._heartbeat(next(sequence))))

        return await run_until_first(
            f"attach:{session.router_id}",
            {
                "read": self._read(session, self._injector.router_frames(frames), watch),
                "write": session.outbox.write_to(context.write),
                "beat": repeat(hello.heartbeat_interval_s, beat),
                "watch": watch.run(),
            },
        )

    async def _read(self, session: RouterSession, frames: AsyncIterator[pb.RouterFrame], watch: SilenceWatch) -> str:
        async for frame in frames:
            if self._sessions.get(session.router_id) is not session:
                return "the router attached again"
            watch.heard()
            self._dispatcher.dispatch(session, frame)
        return "the router closed the stream"

    def _close(self, session: RouterSession, reason: str) -> None:
        logger.info("router %s detached: %s", session.router_id, reason)
        session.outbox.end(reason)
        if self._sessions.get(session.router_id) is session:
            del self._sessions[session.router_id]
            self._withdraw(session)

    def _withdraw(self, session: RouterSession) -> None:
        self._attempts.drop_session(session)
        for half in self._halves:
            half.on_router_lost(session)


def _problem_with(frame: pb.RouterFrame) -> str | None:
    """What is wrong with a first frame, or None."""
    if frame.WhichOneof("frame") != "hello":
        return f"the stream began with {frame.WhichOneof('frame')} instead of hello"
    if not frame.hello.router_id:
        return "router_id is empty"
    if not MIN_INTERVAL_S <= frame.hello.heartbeat_interval_s < frame.hello.heartbeat_timeout_s <= MAX_TIMEOUT_S:
        return (
            f"heartbeat interval {frame.hello.heartbeat_interval_s} s and timeout {frame.hello.heartbeat_timeout_s} s "
            f"must satisfy {MIN_INTERVAL_S} <= interval < timeout <= {MAX_TIMEOUT_S}"
        )
    return None
