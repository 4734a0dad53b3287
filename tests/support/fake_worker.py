"""A worker with a script instead of an engine: a real gRPC server that implements Worker.Attach, for router tests.

The test decides what it says, either through a `Script` that answers commands at once or frame by frame with `say`.
Everything it was told is in `frames`; `next_frame` waits for one, bounded by a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import grpc.aio

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc

WAIT_S = 30.0
LAYOUT = pb.KVLayout(model_hash="m", dtype="float32", block_size=16, num_layers=2, num_kv_heads=2, head_dim=8)

Script = Callable[["FakeWorker", pb.RouterFrame], None]


class FakeWorker(pb_grpc.WorkerServicer):
    """Listens on loopback. `script` is called with every command except hello and heartbeats."""

    def __init__(
        self,
        worker_id: str,
        role: str = "decode",
        script: Script | None = None,
        *,
        layout: pb.KVLayout = LAYOUT,
        max_model_len: int = 512,
        num_blocks: int = 64,
        timing: pb.StepTiming | None = None,
    ) -> None:
        self.address = ""
        self.frames: list[pb.RouterFrame] = []
        self.script = script
        self.beat = pb.WorkerHeartbeat(blocks=pb.BlockCounts(free=num_blocks, total=num_blocks), timing=timing)
        self.beats = True
        self.num_router_heartbeats = 0
        self.hello = pb.WorkerHello(
            worker_id=worker_id,
            role=role,
            layout=layout,
            max_model_len=max_model_len,
            max_num_seqs=64,
            num_blocks=num_blocks,
            max_num_batched_tokens=2048,
            device="cpu",
        )
        self._news = asyncio.Condition()
        self._outboxes: list[asyncio.Queue[pb.WorkerFrame | None]] = []
        self._server: grpc.aio.Server | None = None

    # ---- life

    async def start(self, port: int = 0) -> FakeWorker:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_WorkerServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self.hello.transfer_address = self.address.replace("127.0.0.1", "127.0.0.2")  # where nobody listens
        await self._server.start()
        return self

    async def kill(self) -> None:
        """Die as a killed process does: every stream breaks."""
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    # ---- the service

    async def Attach(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.RouterFrame], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WorkerFrame]:
        outbox: asyncio.Queue[pb.WorkerFrame | None] = asyncio.Queue()
        self._outboxes.append(outbox)
        tasks = [asyncio.create_task(self._listen(request_iterator)), asyncio.create_task(self._beat(outbox))]
        try:
            yield pb.WorkerFrame(hello=self.hello)
            while (frame := await outbox.get()) is not None:
                yield frame
        finally:
            for task in tasks:
                task.cancel()
            self._outboxes.remove(outbox)

    async def _listen(self, frames: AsyncIterator[pb.RouterFrame]) -> None:
        async for frame in frames:
            kind = frame.WhichOneof("frame")
            if kind == "heartbeat":
                self.num_router_heartbeats += 1
                continue
            self.frames.append(frame)
            if kind != "hello" and self.script is not None:
                self.script(self, frame)
            async with self._news:
                self._news.notify_all()

    async def _beat(self, outbox: asyncio.Queue[pb.WorkerFrame | None]) -> None:
        while True:
            if self.beats:
                self.beat.sequence += 1
                outbox.put_nowait(pb.WorkerFrame(heartbeat=self.beat))
            await asyncio.sleep(0.05)

    # ---- what the test looks at

    def received(self, kind: str) -> list[Any]:
        """All commands of one kind so far, oldest first."""
        return [getattr(frame, kind) for frame in self.frames if frame.WhichOneof("frame") == kind]

    async def next_frame(self, kind: str, count: int = 1) -> Any:
        """The `count`-th command of a kind, as soon as it is there."""
        async with asyncio.timeout(WAIT_S), self._news:
            await self._news.wait_for(lambda: len(self.received(kind)) >= count)
        return self.received(kind)[count - 1]

    # ---- what it says

    def say(self, **frame: Any) -> None:
        """Send a frame on every stream, for instance `say(reserved=...)`."""
        for outbox in self._outboxes:
            outbox.put_nowait(pb.WorkerFrame(**frame))

    def hang_up(self) -> None:
        """End every stream from this side."""
        for outbox in self._outboxes:
            outbox.put_nowait(None)

    def say_tokens(self, key: pb.AttemptKey, position: int, token_ids: Sequence[int], finish_reason: str = "") -> None:
        output = pb.TokenOutput(key=key, position=position, token_ids=token_ids, finish_reason=finish_reason)
        self.say(step=pb.StepOutput(outputs=[output]))

    def say_connected(self, decode: FakeWorker) -> None:
        self.say(peer_state=pb.PeerState(worker_id=decode.hello.worker_id, state="connected"))

    def say_events(self, key: pb.AttemptKey, events: Iterable[tuple[str, float]]) -> None:
        report = [pb.AttemptEvent(name=name, at_s=at_s) for name, at_s in events]
        self.say(events=pb.AttemptEvents(key=key, events=report))


# ---- a model that everybody can compute: the token at position p of a sequence of n known tokens is n mod 97


def next_token(num_known_tokens: int) -> int:
    return num_known_tokens % 97


def expected_tokens(num_prompt_tokens: int, max_tokens: int) -> list[int]:
    """What an undisturbed run emits."""
    return [next_token(num_prompt_tokens + index) for index in range(max_tokens)]


def answer(worker: FakeWorker, frame: pb.RouterFrame) -> None:
    """A worker that does everything at once: the script of a healthy one."""
    kind = frame.WhichOneof("frame")
    if kind == "generate":
        command = frame.generate
        emit(worker, command.key, command.spec, 0, command.spec.max_tokens)
    elif kind == "open":
        worker.say(reserved=pb.Reserved(key=frame.open.key, lease=7, generation=1, num_cached_tokens=0))
    elif kind == "prefill":
        emit(worker, frame.prefill.key, frame.prefill.spec, 0, 1)
    elif kind == "connect_peer":
        worker.say(peer_state=pb.PeerState(worker_id=frame.connect_peer.worker_id, state="connected"))


def emit(worker: FakeWorker, key: pb.AttemptKey, spec: pb.RequestSpec, start: int, stop: int) -> None:
    """Say the attempt's tokens [start, stop), one per step, and finish with the last one that it may emit."""
    for index in range(start, min(stop, spec.max_tokens)):
        token = next_token(len(spec.token_ids) + index)
        finish = "length" if index + 1 == spec.max_tokens else ""
        worker.say_tokens(key, spec.num_emitted + index, [token], finish)


def pair_of_answers(prefill_id: str, decode_id: str) -> tuple[FakeWorker, FakeWorker]:
    """A healthy prefill and decode worker: decode goes on as soon as the prefill worker has sent its first token."""
    decode = FakeWorker(decode_id, "decode", answer)

    def prefill_script(worker: FakeWorker, frame: pb.RouterFrame) -> None:
        answer(worker, frame)
        if frame.WhichOneof("frame") == "prefill":
            emit(decode, frame.prefill.key, frame.prefill.spec, 1, frame.prefill.spec.max_tokens)

    return FakeWorker(prefill_id, "prefill", prefill_script), decode
