"""The bench's side of `Worker.Attach`: commands to one worker and the time at which it said what."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from types import TracebackType
from typing import Self

import grpc.aio

from baton.worker.streams import STREAM_OPTIONS
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerStub

_BEAT_S, _TIMEOUT_S = 0.25, 30.0


class WorkerStream:
    """One attached stream. Every wait is bounded and ends with RuntimeError when the request or the stream fails."""

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._hello = pb.AttachHello(router_id=name, heartbeat_interval_s=_BEAT_S, heartbeat_timeout_s=_TIMEOUT_S)
        self._writing = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._failure: dict[str, str] = {}
        self._reserved: dict[str, pb.Reserved] = {}
        self.first_token_at: dict[str, float] = {}
        self.num_tokens: dict[str, int] = defaultdict(int)
        self._finished: set[str] = set()
        self._connected: dict[str, float] = {}
        self._broken = ""

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._address, options=STREAM_OPTIONS)
        self._call = WorkerStub(self._channel).Attach(None)
        await self._call.write(pb.RouterFrame(hello=self._hello))
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        self._call.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close(None)

    async def connect(self, worker_id: str, address: str, timeout_s: float) -> float:
        """Seconds until the worker says that it is connected with that peer."""
        started = time.monotonic()
        await self._send(pb.RouterFrame(connect_peer=pb.ConnectPeer(worker_id=worker_id, address=address)))
        await self._until(lambda: worker_id in self._connected, worker_id, timeout_s)
        return self._connected[worker_id] - started

    async def generate(self, name: str, spec: pb.RequestSpec) -> None:
        await self._send(pb.RouterFrame(generate=pb.GenerateCommand(key=_key(name), spec=spec)))

    async def open(self, name: str, spec: pb.RequestSpec, prefill_worker_id: str) -> pb.Reserved:
        command = pb.OpenCommand(key=_key(name), spec=spec, prefill_worker_id=prefill_worker_id)
        await self._send(pb.RouterFrame(open=command))
        await self._until(lambda: name in self._reserved, name)
        return self._reserved[name]

    async def prefill(self, name: str, spec: pb.RequestSpec, decode_worker_id: str, reserved: pb.Reserved) -> None:
        command = pb.PrefillCommand(
            key=_key(name),
            spec=spec,
            decode_worker_id=decode_worker_id,
            lease=reserved.lease,
            generation=reserved.generation,
            num_cached_tokens=reserved.num_cached_tokens,
        )
        await self._send(pb.RouterFrame(prefill=command))

    async def cancel(self, name: str) -> None:
        await self._send(pb.RouterFrame(cancel=pb.CancelCommand(key=_key(name))))

    async def first_token(self, name: str, timeout_s: float = 120.0) -> None:
        await self._until(lambda: name in self.first_token_at, name, timeout_s)

    async def finished(self, name: str, timeout_s: float = 120.0) -> None:
        await self._until(lambda: name in self._finished, name, timeout_s)

    async def _until(self, condition: object, name: str, timeout_s: float = 60.0) -> None:
        assert callable(condition)
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: condition() or name in self._failure or bool(self._broken))
        except TimeoutError:
            raise RuntimeError(f"{name}: nothing from {self._address} within {timeout_s:g} s") from None
        if not condition():
            raise RuntimeError(f"{name}: {self._failure.get(name) or self._broken}")

    async def _send(self, frame: pb.RouterFrame) -> None:
        async with self._writing:
            await self._call.write(frame)

    async def _beat(self) -> None:
        sequence = 0
        while True:
            await self._send(pb.RouterFrame(heartbeat=pb.RouterHeartbeat(sequence=sequence)))
            sequence += 1
            await asyncio.sleep(_BEAT_S)

    async def _read(self) -> None:
        try:
            async for frame in self._call:
                self._take(frame)
                async with self._changed:
                    self._changed.notify_all()
            self._broken = "the worker closed the stream"
        except grpc.aio.AioRpcError as error:
            self._broken = f"{error.code().name}: {error.details()}"
        async with self._changed:
            self._changed.notify_all()

    def _take(self, frame: pb.WorkerFrame) -> None:
        match frame.WhichOneof("frame"):
            case "reserved":
                self._reserved[frame.reserved.key.request_id] = frame.reserved
            case "refused":
                self._failure[frame.refused.key.request_id] = f"refused ({frame.refused.code}): {frame.refused.message}"
            case "failed":
                self._failure[frame.failed.key.request_id] = f"failed ({frame.failed.code}): {frame.failed.message}"
            case "peer_state":
                if frame.peer_state.state == "connected":
                    self._connected[frame.peer_state.worker_id] = time.monotonic()
            case "step":
                for output in frame.step.outputs:
                    self._take_tokens(output)

    def _take_tokens(self, output: pb.TokenOutput) -> None:
        name = output.key.request_id
        self.first_token_at.setdefault(name, time.monotonic())
        self.num_tokens[name] += len(output.token_ids)
        if output.finish_reason:
            self._finished.add(name)


def _key(name: str) -> pb.AttemptKey:
    return pb.AttemptKey(request_id=name, attempt=1)
