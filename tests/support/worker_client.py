"""A router's side of `Worker.Attach`, for tests: sends commands, collects what the worker says.

Every wait is for a condition and bounded; nothing sleeps for a guessed time.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from baton.worker.streams import STREAM_OPTIONS
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerStub

WAIT_S = 30.0


class WorkerClient:
    """One attached stream. Results are kept by (request id, attempt); `tokens` in order of position."""

    def __init__(
        self, address: str, router_id: str = "router", interval_s: float = 0.05, timeout_s: float = 5.0
    ) -> None:
        self._address = address
        self._hello = pb.AttachHello(
            router_id=router_id, heartbeat_interval_s=interval_s, heartbeat_timeout_s=timeout_s
        )
        self._interval_s = interval_s
        self._writing = asyncio.Lock()  # gRPC takes one write at a time
        self._changed = asyncio.Condition()
        self.hello: pb.WorkerHello | None = None
        self.frames: list[pb.WorkerFrame] = []
        self.tokens: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
        self.logprobs: dict[tuple[str, int], dict[int, pb.TokenLogprobs]] = defaultdict(dict)
        self.prompt_logprobs: dict[tuple[str, int], list[pb.TokenLogprobs]] = {}
        self.finish_reasons: dict[tuple[str, int], str] = {}
        self.reserved: dict[tuple[str, int], pb.Reserved] = {}
        self.refused: dict[tuple[str, int], pb.Refused] = {}
        self.failed: dict[tuple[str, int], pb.AttemptFailed] = {}
        self.events: dict[tuple[str, int], list[str]] = defaultdict(list)
        self.peer_states: dict[str, pb.PeerState] = {}
        self.peer_history: list[tuple[str, str]] = []
        self.heartbeats: list[pb.WorkerHeartbeat] = []
        self.num_step_frames = 0
        self.ended: str | None = None

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._address, options=STREAM_OPTIONS)
        self._call = WorkerStub(self._channel).Attach(None)
        await self._call.write(pb.RouterFrame(hello=self._hello))
        self._reader = asyncio.create_task(self._read(), name="client-read")
        self._beats = asyncio.create_task(self._beat(), name="client-beat")
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.cut()

    async def cut(self) -> None:
        """Break the stream, as a dying router does."""
        self._beats.cancel()
        self._call.cancel()
        await asyncio.gather(self._reader, self._beats, return_exceptions=True)
        await self._channel.close(None)

    def silence(self) -> None:
        """Send no heartbeat any more, but keep the stream."""
        self._beats.cancel()

    async def send(self, **frame: object) -> None:
        async with self._writing:
            await self._call.write(pb.RouterFrame(**frame))  # type: ignore[arg-type]

    async def generate(self, request_id: str, spec: pb.RequestSpec, attempt: int = 1) -> tuple[str, int]:
        await self.send(generate=pb.GenerateCommand(key=_key(request_id, attempt), spec=spec))
        return request_id, attempt

    async def open(
        self, request_id: str, spec: pb.RequestSpec, prefill_worker_id: str, attempt: int = 1
    ) -> tuple[str, int]:
        command = pb.OpenCommand(key=_key(request_id, attempt), spec=spec, prefill_worker_id=prefill_worker_id)
        await self.send(open=command)
        return request_id, attempt

    async def prefill(
        self, request_id: str, spec: pb.RequestSpec, decode_worker_id: str, reserved: pb.Reserved, attempt: int = 1
    ) -> tuple[str, int]:
        command = pb.PrefillCommand(
            key=_key(request_id, attempt),
            spec=spec,
            decode_worker_id=decode_worker_id,
            lease=reserved.lease,
            generation=reserved.generation,
            num_cached_tokens=reserved.num_cached_tokens,
        )
        await self.send(prefill=command)
        return request_id, attempt

    async def cancel(self, request_id: str, attempt: int = 1) -> None:
        await self.send(cancel=pb.CancelCommand(key=_key(request_id, attempt)))

    async def until(self, condition: Callable[[], bool], what: str = "condition") -> None:
        """Wait until `condition` holds after some frame; fails with what is known after WAIT_S."""
        try:
            async with asyncio.timeout(WAIT_S), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            last = self.heartbeats[-1] if self.heartbeats else None
            raise AssertionError(
                f"{what} did not come about; failed {self.failed}, refused {self.refused}, "
                f"tokens { {key: len(value) for key, value in self.tokens.items()} }, ended {self.ended}, "
                f"last heartbeat {last}"
            ) from None

    async def attached(self) -> pb.WorkerHello:
        await self.until(lambda: self.hello is not None, "hello")
        assert self.hello is not None
        return self.hello

    async def finished(self, key: tuple[str, int]) -> list[int]:
        """Wait for the attempt's terminal event, which must be a finish; its tokens in order."""
        await self.until(
            lambda: key in self.finish_reasons or key in self.failed or key in self.refused, f"the end of {key}"
        )
        assert key not in self.failed, self.failed[key]
        assert key not in self.refused, self.refused[key]
        return self.in_order(key)

    def in_order(self, key: tuple[str, int]) -> list[int]:
        positions = sorted(self.tokens[key])
        assert positions == list(range(positions[0], positions[0] + len(positions))), positions
        return [self.tokens[key][position] for position in positions]

    async def at_rest(self) -> pb.WorkerHeartbeat:
        """Wait for a new heartbeat in which nothing runs, is leased, quarantined or staged; I4 holds in all."""
        seen = len(self.heartbeats)
        await self.until(lambda: any(_at_rest(beat) for beat in self.heartbeats[seen + 1 :]), "rest")
        return self.heartbeats[-1]

    async def _beat(self) -> None:
        sequence = 0
        while True:
            await self.send(heartbeat=pb.RouterHeartbeat(sequence=sequence))
            sequence += 1
            await asyncio.sleep(self._interval_s)

    async def _read(self) -> None:
        try:
            async for frame in self._call:
                await self._take(frame)
            reason = "closed by the worker"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except asyncio.CancelledError:
            reason = "cut"
        async with self._changed:
            self.ended = reason
            self._changed.notify_all()

    async def _take(self, frame: pb.WorkerFrame) -> None:
        async with self._changed:
            self.frames.append(frame)
            self._sort(frame)
            self._changed.notify_all()

    def _sort(self, frame: pb.WorkerFrame) -> None:
        match frame.WhichOneof("frame"):
            case "hello":
                self.hello = frame.hello
            case "reserved":
                self.reserved[_pair(frame.reserved.key)] = frame.reserved
            case "refused":
                self._terminal(_pair(frame.refused.key))
                self.refused[_pair(frame.refused.key)] = frame.refused
            case "failed":
                self._terminal(_pair(frame.failed.key))
                self.failed[_pair(frame.failed.key)] = frame.failed
            case "events":
                self.events[_pair(frame.events.key)].extend(event.name for event in frame.events.events)
            case "peer_state":
                self.peer_states[frame.peer_state.worker_id] = frame.peer_state
                self.peer_history.append((frame.peer_state.worker_id, frame.peer_state.state))
            case "heartbeat":
                assert _conserved(frame.heartbeat.blocks), frame.heartbeat
                self.heartbeats.append(frame.heartbeat)
            case "step":
                self.num_step_frames += 1
                for output in frame.step.outputs:
                    self._take_tokens(output)

    def _take_tokens(self, output: pb.TokenOutput) -> None:
        key = _pair(output.key)
        assert key not in self.finish_reasons, f"tokens after the finish of {key}"
        for offset, token in enumerate(output.token_ids):
            assert output.position + offset not in self.tokens[key], f"position {output.position} of {key} came twice"
            self.tokens[key][output.position + offset] = token
        assert len(output.logprobs) in (0, len(output.token_ids)), output
        for offset, known in enumerate(output.logprobs):
            self.logprobs[key][output.position + offset] = known
        if output.prompt_logprobs:
            assert output.position == 0, f"log-probabilities of the prompt of {key} at position {output.position}"
            self.prompt_logprobs[key] = list(output.prompt_logprobs)
        if output.finish_reason:
            self._terminal(key)
            self.finish_reasons[key] = output.finish_reason

    def _terminal(self, key: tuple[str, int]) -> None:
        for ends in (self.finish_reasons, self.refused, self.failed):
            assert key not in ends, f"{key} ended twice"


def _key(request_id: str, attempt: int) -> pb.AttemptKey:
    return pb.AttemptKey(request_id=request_id, attempt=attempt)


def _pair(key: pb.AttemptKey) -> tuple[str, int]:
    return key.request_id, key.attempt


def _conserved(blocks: pb.BlockCounts) -> bool:
    return blocks.free + blocks.cached + blocks.running + blocks.leased + blocks.quarantined == blocks.total


def _at_rest(beat: pb.WorkerHeartbeat) -> bool:
    blocks = beat.blocks
    busy = blocks.running + blocks.leased + blocks.quarantined + blocks.staging_in_use
    return busy + beat.num_running + beat.num_waiting == 0
