"""One attached worker: one Worker.Attach stream from hello to its end.

The link (worker_link.py) makes a session, runs it and throws it away; a session never comes back to life, so nothing
that a lost worker says later can reach an attempt. Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

import grpc.aio

from baton.common.clock import Clock
from protos import worker_pb2 as pb
from router.policy import StepTimes, WorkerSnapshot

AttemptId = tuple[str, int]
AttachCall = grpc.aio.StreamStreamCall[pb.RouterFrame, pb.WorkerFrame]
_DEFAULT_BUSY_S = 0.05
_log = logging.getLogger("baton.router")


class AttemptSink(Protocol):
    """Takes what a worker says of one attempt. Called on the event loop; must not block."""

    def on_reserved(self, worker_id: str, reserved: pb.Reserved) -> None: ...

    def on_refused(self, worker_id: str, refused: pb.Refused) -> None: ...

    def on_tokens(self, worker_id: str, output: pb.TokenOutput) -> None: ...

    def on_failed(self, worker_id: str, failed: pb.AttemptFailed) -> None: ...

    def on_worker_lost(self, worker_id: str) -> None: ...


class SessionObserver(Protocol):
    """Takes what a worker says of itself and of its peers: the registry."""

    def on_heartbeat(self, session: WorkerSession, beat: pb.WorkerHeartbeat) -> None: ...

    def on_peer_state(self, session: WorkerSession, state: pb.PeerState) -> None: ...

    def on_attempt_events(self, session: WorkerSession, report: pb.AttemptEvents) -> None: ...

    def on_fenced_frame(self) -> None: ...

    def on_room(self) -> None:
        """An attempt left a worker or its prefill queue, so there may be room."""
        ...


class WorkerSession:
    """`hello` is what the worker said first. `enlist` and `send` are for attempts, `run` is for the link."""

    def __init__(self, address: str, hello: pb.WorkerHello, observer: SessionObserver, clock: Clock) -> None:
        self.address = address
        self.hello = hello
        self.worker_id = hello.worker_id
        self.beat: pb.WorkerHeartbeat | None = None
        self.draining = False
        self.lost = False
        self._observer = observer
        self._clock = clock
        self._outbox: asyncio.Queue[pb.RouterFrame] = asyncio.Queue()
        self._sinks: dict[AttemptId, AttemptSink] = {}
        self._pending_prefill: dict[AttemptId, int] = {}
        self._foreign_requests = 0
        self._foreign_tokens = 0
        self._busy_until = 0.0
        self._last_heard = clock.now()
        self._sequence = 0

    # ---- for attempts

    def enlist(self, attempt: AttemptId, sink: AttemptSink, prefill_tokens: int) -> None:
        """Deliver frames about `attempt` to `sink` until `forget`. `prefill_tokens`: what it will compute here."""
        self._sinks[attempt] = sink
        if prefill_tokens:
            self._pending_prefill[attempt] = prefill_tokens

    def send(self, frame: pb.RouterFrame) -> None:
        """Queue a frame. Those of a lost session go nowhere."""
        self._outbox.put_nowait(frame)

    def prefill_ended(self, attempt: AttemptId) -> None:
        """Its prompt is computed. Repeating it is a no-op."""
        if self._pending_prefill.pop(attempt, None) is not None:
            self._observer.on_room()

    def forget(self, attempt: AttemptId) -> None:
        """Nothing more of `attempt` is delivered."""
        self._pending_prefill.pop(attempt, None)
        if self._sinks.pop(attempt, None) is not None:
            self._busy_until = 0.0
            self._observer.on_room()

    def refused_busy(self, retry_after_s: float) -> None:
        """Offer it nothing more for a while, or until one of its attempts ends."""
        self._busy_until = self._clock.now() + (retry_after_s if retry_after_s > 0 else _DEFAULT_BUSY_S)

    # ---- state

    @property
    def num_attempts(self) -> int:
        return len(self._sinks)

    @property
    def capacity(self) -> int:
        """The longest sequence, in tokens, that its model and its pool can hold."""
        return min(self.hello.max_model_len, self.hello.num_blocks * self.hello.layout.block_size)

    def snapshot(self) -> WorkerSnapshot:
        """Loads are the router's own count, exact at this moment, plus what others had at the last heartbeat."""
        return WorkerSnapshot(
            worker_id=self.worker_id,
            can_decode=self.hello.role == "decode",
            capacity=self.capacity,
            max_num_batched_tokens=max(self.hello.max_num_batched_tokens, 1),
            step=self._step_times(),
            queued_prefill_tokens=sum(self._pending_prefill.values()) + self._foreign_tokens,
            num_requests=len(self._sinks) + self._foreign_requests,
            has_room=not self.draining and self._clock.now() >= self._busy_until,
        )

    def _step_times(self) -> StepTimes | None:
        if self.beat is None or self.beat.timing.samples == 0:
            return None
        timing = self.beat.timing
        return StepTimes(timing.base_s, timing.per_prefill_token_s, timing.per_decode_seq_s)

    # ---- for the link

    async def run(self, call: AttachCall, interval_s: float, timeout_s: float) -> str:
        """Serve the stream until it ends; return why it did. Every attempt here is told before this returns."""
        tasks = [
            asyncio.create_task(self._read(call)),
            asyncio.create_task(self._write(call)),
            asyncio.create_task(self._beat(interval_s)),
            asyncio.create_task(self._watch(interval_s, timeout_s)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return _why_ended(done.pop())
        finally:
            self.lost = True
            for task in tasks:
                task.cancel()
            call.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tell_attempts()

    def _tell_attempts(self) -> None:
        for sink in list(self._sinks.values()):
            sink.on_worker_lost(self.worker_id)
        self._sinks.clear()
        self._pending_prefill.clear()

    async def _read(self, call: AttachCall) -> str:
        async for frame in _frames(call):
            self._last_heard = self._clock.now()
            self._dispatch(frame)
        return "the worker closed the stream"

    async def _write(self, call: AttachCall) -> str:
        while True:
            await call.write(await self._outbox.get())

    async def _beat(self, interval_s: float) -> str:
        while True:
            self._sequence += 1
            self.send(pb.RouterFrame(heartbeat=pb.RouterHeartbeat(sequence=self._sequence)))
            await asyncio.sleep(interval_s)

    async def _watch(self, interval_s: float, timeout_s: float) -> str:
        """Silence past the deadline is a lost worker, unless it was this event loop that stood still."""
        while True:
            before = self._clock.now()
            await asyncio.sleep(interval_s)
            now = self._clock.now()
            if now - before > interval_s + timeout_s / 2:
                self._last_heard = max(self._last_heard, now - timeout_s / 2)
            elif now - self._last_heard > timeout_s:
                return f"no frame for {now - self._last_heard:.1f} s"

    def _dispatch(self, frame: pb.WorkerFrame) -> None:
        kind = frame.WhichOneof("frame")
        if kind == "step":
            for output in frame.step.outputs:
                if sink := self._sink(output.key):
                    sink.on_tokens(self.worker_id, output)
        elif kind == "heartbeat":
            self._on_heartbeat(frame.heartbeat)
        elif kind == "events":
            self._observer.on_attempt_events(self, frame.events)
        elif kind == "peer_state":
            self._observer.on_peer_state(self, frame.peer_state)
        elif kind == "reserved":
            if sink := self._sink(frame.reserved.key):
                sink.on_reserved(self.worker_id, frame.reserved)
        elif kind == "refused":
            self.draining = self.draining or frame.refused.code == "draining"
            if sink := self._sink(frame.refused.key):
                sink.on_refused(self.worker_id, frame.refused)
        elif kind == "failed" and (sink := self._sink(frame.failed.key)):
            sink.on_failed(self.worker_id, frame.failed)

    def _sink(self, key: pb.AttemptKey) -> AttemptSink | None:
        sink = self._sinks.get((key.request_id, key.attempt))
        if sink is None:
            self._observer.on_fenced_frame()
        return sink

    def _on_heartbeat(self, beat: pb.WorkerHeartbeat) -> None:
        own_tokens = sum(self._pending_prefill.values())
        self._foreign_tokens = max(beat.queued_prefill_tokens - own_tokens, 0)
        self._foreign_requests = max(beat.num_waiting + beat.num_running - len(self._sinks), 0)
        self._observer.on_heartbeat(self, beat)
        self.beat = beat


async def _frames(call: AttachCall) -> AsyncIterator[pb.WorkerFrame]:
    while True:
        frame = await call.read()
        if not isinstance(frame, pb.WorkerFrame):
            return
        yield frame


def _why_ended(task: asyncio.Task[str]) -> str:
    if task.cancelled():
        return "the stream was cancelled"
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, asyncio.InvalidStateError | grpc.aio.UsageError):
        return "the stream is closed"
    _log.error("a defect in the router ended a worker's session", exc_info=error)
    return f"internal error: {error!r}"
