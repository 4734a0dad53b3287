"""What goes wrong inside a worker is counted, and nothing stands still because of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
import torch

from baton.engine.ports import Abort, Command, EngineStats
from baton.worker import actor_base
from baton.worker.coordinator import Coordinator
from baton.worker.faults import Faults
from baton.worker.pair import Pair, PairEvent, Pairs
from baton.worker.session import RouterSession
from baton.worker.shell import WorkerShell
from baton.worker.streams import repeat
from baton.worker.tasks import Tasks
from kv_transfer.events import EpochDestroyed, PeerLost
from kv_transfer.transport import TransferError
from prefill_worker import peers as peers_module
from prefill_worker.dialer import Dialer, PeerRefused
from prefill_worker.peers import Peers
from protos import worker_pb2 as pb
from tests.support.eventually import eventually
from tests.support.worker_client import WorkerClient
from tests.unit.worker.fake_engine import CONFIG, LAYOUT, FakeBuilder, FakeEngine
from tests.unit.worker.test_attach import HOST, spec

WAIT_S = 20.0


# ---- the engine


async def test_a_lost_engine_is_told_and_turns_health_bad() -> None:
    builder = FakeBuilder()
    lost: list[str] = []
    shell = WorkerShell(CONFIG, "decode", HOST, builder, on_lost=lost.append)
    await shell.start()
    try:
        assert shell.health()["healthy"]
        builder.engine.ports.on_lost("RuntimeError('illegal access')")
        await eventually(lambda: bool(lost))
        assert lost == ["the engine is lost: RuntimeError('illegal access')"]
        assert not shell.health()["healthy"]
    finally:
        await shell.stop()


async def test_an_engine_that_stands_still_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to do so for the whole time: a pause of the process itself counts as one look."""
    ages = iter([0.0, 9.0, 0.0, *[9.0] * 7, 0.0, *[9.0] * 100])
    builder = FakeBuilder()
    lost: list[str] = []
    config = CONFIG.model_copy(update={"engine": CONFIG.engine.model_copy(update={"stall_timeout_s": 0.08})})
    looks: list[float] = []

    def stats(engine: FakeEngine) -> EngineStats:
        looks.append(next(ages))
        return EngineStats(engine.blocks, 0, 1, 0, 0, looks[-1])

    shell = WorkerShell(config, "decode", HOST, builder, on_lost=lost.append)
    monkeypatch.setattr(FakeEngine, "stats", stats)
    await shell.start()
    try:
        looks.clear()
        await eventually(lambda: bool(lost))
        assert lost == ["the engine is lost: the engine has work and made no step for 0.08 s"]
        assert looks[-9:] == [0.0, *[9.0] * 8]
        assert not shell.health()["healthy"]
    finally:
        await shell.stop()


def test_a_worker_process_whose_engine_is_lost_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    actor_base.end_process("the engine is lost")
    assert codes == [actor_base.EXIT_CODE]
    assert actor_base.EXIT_CODE != 0, "Ray would take that for an end that was meant"


# ---- the protocol


async def test_a_machine_that_fails_on_an_event_keeps_its_timer() -> None:
    ticks: list[int] = []
    faults = Faults()

    def step(state: int, event: int) -> tuple[int, tuple[int, ...]]:
        if event == 1:
            raise KeyError("a defect")
        return state + 1, (event,)

    coordinator: Coordinator[int, int, int] = Coordinator(0, step, ticks.append, faults)
    numbers = iter(range(100))
    timer = asyncio.create_task(repeat(0.0, lambda: coordinator.feed(next(numbers))))
    await eventually(lambda: len(ticks) >= 3)
    timer.cancel()
    assert ticks[:3] == [0, 2, 3]
    assert faults.count == 1
    assert coordinator.state == len(ticks)


# ---- pairs


class StubbornLink:
    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.closed = False

    def close(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.closed = True


class Deaf:
    """A stream to nobody."""

    def send(self, frame: object) -> None:
        pass


@pytest.mark.parametrize("error", [TransferError("still busy"), RuntimeError("a defect of the library")])
async def test_an_epoch_that_cannot_be_destroyed_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("baton.worker.pair.CLOSE_RETRY_S", 0.0)
    events: list[PairEvent] = []
    faults = Faults()
    tasks = Tasks(faults)
    pairs: Pairs[pb.WorkerFrame, StubbornLink] = Pairs(events.append, LAYOUT, torch.device("cpu"), tasks, faults)
    link = StubbornLink(error, error)
    pair = Pair[pb.WorkerFrame, StubbornLink]("peer", "epoch", Deaf(), link, 1, 4096)

    async def stream() -> str:
        return "the peer closed the stream"

    serving = asyncio.create_task(pairs.serve(pair, stream))
    await eventually(lambda: any(isinstance(event, PeerLost) for event in events))
    pairs.destroy("epoch", "lost")
    assert await asyncio.wait_for(serving, WAIT_S) == "the peer closed the stream"
    assert events[-1] == EpochDestroyed("peer", "epoch")
    assert link.closed
    assert faults.count == 2
    await tasks.cancel_all()


class Dials:
    """Stands for the dialer: each try ends as it is told."""

    def __init__(self, *outcomes: Exception | str) -> None:
        self.outcomes = list(outcomes)
        self.tries = 0

    async def serve_once(
        self, worker_id: str, address: str, on_connected: Callable[[], None], on_lost: Callable[[str], None]
    ) -> str:
        self.tries += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        on_connected()
        on_lost(outcome)
        return outcome

    def forget(self, worker_id: str) -> None:
        pass


async def test_a_try_to_connect_that_goes_wrong_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "FIRST_PAUSE_S", 0.0)
    dials = Dials(KeyError("a defect"), "the peer closed the stream", PeerRefused("layouts differ"))
    faults = Faults()
    tasks = Tasks(faults)
    peers = Peers(cast(Dialer, dials), tasks, faults, lambda _: None)
    session = RouterSession(1, "router")
    peers.want(session, "decode-1", "host:1")
    said: list[str] = []

    async def write(frame: pb.WorkerFrame) -> None:
        said.append(frame.peer_state.state)

    writing = asyncio.create_task(session.outbox.write_to(write))
    await eventually(lambda: "refused" in said)
    assert said[1:] == ["connecting", "lost", "connecting", "connected", "lost", "connecting", "refused"]
    assert (dials.tries, faults.count) == (3, 1)
    writing.cancel()
    await peers.stop()


# ---- routers


class HeldCall:
    """A stream whose peer does not read: writes wait until `released`."""

    def __init__(self, router_id: str) -> None:
        self.frames: asyncio.Queue[pb.RouterFrame | None] = asyncio.Queue()
        self.released = asyncio.Event()
        hello = pb.AttachHello(router_id=router_id, heartbeat_interval_s=1.0, heartbeat_timeout_s=10.0)
        self.frames.put_nowait(pb.RouterFrame(hello=hello))

    async def __aiter__(self) -> AsyncIterator[pb.RouterFrame]:
        while (frame := await self.frames.get()) is not None:
            yield frame

    async def write(self, frame: pb.WorkerFrame) -> None:
        await self.released.wait()


async def test_what_still_comes_on_a_stream_that_was_replaced_is_not_served() -> None:
    builder = FakeBuilder()
    shell = WorkerShell(CONFIG, "decode", HOST, builder)
    await shell.start()
    try:
        call: Any = HeldCall("router")
        older = asyncio.create_task(shell._attach.Attach(call, call))
        await eventually(lambda: "router" in shell._attach._sessions)
        async with WorkerClient(shell.address, "router") as newer:
            await newer.attached()
            for name in ("a", "b"):
                late = pb.GenerateCommand(key=pb.AttemptKey(request_id=name, attempt=1), spec=spec())
                call.frames.put_nowait(pb.RouterFrame(generate=late))
            await asyncio.wait_for(older, WAIT_S)
            await newer.generate("c", spec())
            await newer.until(lambda: bool(_names(builder.engine)), "a request")
            assert _names(builder.engine) == ["c"]
            assert shell.health()["num_attempts"] == 1
    finally:
        await shell.stop()


def _names(engine: FakeEngine) -> list[str]:
    commands: list[Command] = [command for command in engine.commands if not isinstance(command, Abort)]
    return [command.request.request_id.split("/")[1] for command in commands]  # type: ignore[union-attr]
