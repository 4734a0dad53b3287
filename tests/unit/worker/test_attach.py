"""The router's stream, over real gRPC, in front of an engine that does what the test says."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from baton.engine.ports import BlockCounts, RequestFailed, TokenOutput
from baton.worker.shell import WorkerShell
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerStub
from tests.support.worker_client import WorkerClient
from tests.unit.worker.fake_engine import CONFIG, LAYOUT, FakeBuilder, FakeEngine

HOST = "127.0.0.1"


def spec(**fields: object) -> pb.RequestSpec:
    values: dict[str, object] = {"token_ids": [1, 2, 3], "max_tokens": 4, "top_p": 1.0, **fields}
    return pb.RequestSpec(**values)  # type: ignore[arg-type]


@pytest.fixture
def builder() -> FakeBuilder:
    return FakeBuilder()


@pytest.fixture
async def shell(builder: FakeBuilder) -> AsyncIterator[WorkerShell]:
    shell = WorkerShell(CONFIG, "decode", HOST, builder)
    await shell.start()
    yield shell
    await shell.stop()


@pytest.fixture
def engine(shell: WorkerShell, builder: FakeBuilder) -> FakeEngine:
    return builder.engine


async def added(client: WorkerClient, engine: FakeEngine, count: int) -> list[str]:
    await client.until(lambda: len(engine.added) == count, f"{count} requests in the engine")
    return engine.added


async def test_hello_describes_the_worker(shell: WorkerShell) -> None:
    async with WorkerClient(shell.address) as client:
        hello = await client.attached()
    assert hello.worker_id == shell.worker_id
    assert hello.role == "decode"
    assert (hello.layout.model_hash, hello.layout.num_layers) == (LAYOUT.model_hash, LAYOUT.num_layers)
    assert (hello.max_model_len, hello.num_blocks, hello.device) == (64, 8, "cpu")


async def test_generate_reaches_the_engine_and_its_tokens_come_back(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address) as client:
        key = await client.generate("a", spec(num_emitted=1, seed=7, temperature=0.5, stop_token_ids=[9]))
        [id_] = await added(client, engine, 1)
        request = engine.commands[0].request  # type: ignore[union-attr]
        assert request.token_ids == [1, 2, 3]
        assert (request.num_emitted, request.hand_over) == (1, False)
        assert (request.sampling.seed, request.sampling.temperature) == (7, 0.5)
        assert request.sampling.stop_token_ids == {9}
        engine.step(TokenOutput(id_, 1, (40,), None))
        engine.step(TokenOutput(id_, 2, (41, 9), "stop"))
        assert await client.finished(key) == [40, 41, 9]
        assert client.finish_reasons[key] == "stop"
        assert client.events[key][0] == "accepted"


async def test_a_step_is_one_frame_per_router(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address, "one") as one, WorkerClient(shell.address, "two") as two:
        for client in (one, two):
            await client.attached()
        keys = [await one.generate(name, spec()) for name in ("a", "b", "c")]
        await added(one, engine, 3)
        await two.generate("a", spec())
        ids = await added(two, engine, 4)
        assert len(set(ids)) == 4
        engine.step(*(TokenOutput(id_, 0, (number,), "length") for number, id_ in enumerate(ids)))
        assert [await one.finished(key) for key in keys] == [[0], [1], [2]]
        assert await two.finished(("a", 1)) == [3]
        assert (one.num_step_frames, two.num_step_frames) == (1, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token_ids": []}, "empty"),
        ({"token_ids": [1, 100]}, "token id 100 is not in the vocabulary of 100"),
        ({"max_tokens": 62}, "exceed the model's length of 64"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": float("nan")}, "temperature"),
        ({"num_emitted": 3}, "leave no prompt"),
        ({"deadline_s": -1.0}, "deadline_s"),
    ],
)
async def test_an_invalid_request_is_refused_with_its_reason(
    shell: WorkerShell, engine: FakeEngine, wrong: dict[str, object], message: str
) -> None:
    async with WorkerClient(shell.address) as client:
        key = await client.generate("a", spec(**wrong))
        await client.until(lambda: key in client.refused, "the refusal")
    assert client.refused[key].code == "invalid"
    assert message in client.refused[key].message
    assert engine.commands == []


async def test_the_longest_request_that_fits_is_taken(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address) as client:
        await client.generate("a", spec(token_ids=[99] * 3, max_tokens=61))
        await added(client, engine, 1)


async def test_a_command_that_this_worker_does_not_know_is_refused(shell: WorkerShell) -> None:
    async with WorkerClient(shell.address) as client:
        key = await client.open("a", spec(), "prefill-1")
        await client.until(lambda: key in client.refused, "the refusal")
    assert client.refused[key].code == "invalid"
    assert "open" in client.refused[key].message


async def test_a_repeated_command_changes_nothing(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address) as client:
        key = await client.generate("a", spec())
        await client.generate("a", spec())
        [id_] = await added(client, engine, 1)
        engine.step(TokenOutput(id_, 0, (5,), "length"))
        await client.finished(key)
        await client.generate("a", spec())
        await client.generate("b", spec())
        assert len(await added(client, engine, 2)) == 2
        await client.generate("a", spec(), attempt=2)
        assert engine.added[0] != (await added(client, engine, 3))[2]


async def test_cancel_aborts_in_the_engine_and_silences_the_attempt(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address) as client:
        key = await client.generate("a", spec())
        [id_] = await added(client, engine, 1)
        await client.cancel("a")
        await client.cancel("a")
        await client.until(lambda: engine.aborted == [id_], "the abort")
        engine.step(TokenOutput(id_, 0, (5,), None), failures=(RequestFailed(id_, "aborted", "late"),))
        other = await client.generate("b", spec())
        engine.step(TokenOutput((await added(client, engine, 2))[1], 0, (6,), "length"))
        assert await client.finished(other) == [6]
        assert key not in client.tokens
        assert key not in client.failed
        assert engine.aborted == [id_]


async def test_a_cancel_that_overtakes_its_command_wins(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address) as client:
        await client.cancel("a")
        await client.generate("a", spec())
        await client.generate("b", spec())
        await client.until(lambda: bool(engine.added), "a request")
        assert [id_.split("/")[1] for id_ in engine.added] == ["b"]


async def test_an_engine_failure_is_told_once(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address) as client:
        key = await client.generate("a", spec())
        [id_] = await added(client, engine, 1)
        engine.step(failures=(RequestFailed(id_, "internal", "broken"), RequestFailed(id_, "internal", "again")))
        await client.until(lambda: key in client.failed, "the failure")
        assert client.failed[key].code == "internal"
        assert "broken" in client.failed[key].message
        assert client.failed[key].retryable


async def test_the_deadline_ends_a_request(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address) as client:
        key = await client.generate("a", spec(deadline_s=0.05))
        await client.until(lambda: key in client.failed, "the failure")
        assert (client.failed[key].code, client.failed[key].retryable) == ("deadline", False)
        assert engine.aborted == engine.added


async def test_a_cut_stream_frees_only_its_own_requests(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address, "stays") as stays:
        await stays.generate("a", spec())
        [kept] = await added(stays, engine, 1)
        async with WorkerClient(shell.address, "dies") as dies:
            await dies.generate("a", spec())
            await added(dies, engine, 2)
            await dies.cut()
        await stays.until(lambda: bool(engine.aborted), "the abort")
        assert engine.aborted == [id_ for id_ in engine.added if id_ != kept]
        engine.step(TokenOutput(kept, 0, (5,), "length"))
        assert await stays.finished(("a", 1)) == [5]


async def test_silence_ends_the_stream_and_frees(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address, timeout_s=0.3) as client:
        await client.generate("a", spec())
        await added(client, engine, 1)
        client.silence()
        await client.until(lambda: client.ended is not None, "the end of the stream")
        assert engine.aborted == engine.added


async def test_attaching_again_frees_what_the_older_stream_asked_for(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address, "same") as older:
        await older.generate("a", spec())
        await added(older, engine, 1)
        async with WorkerClient(shell.address, "same") as newer:
            await newer.attached()
            await older.until(lambda: older.ended is not None, "the end of the older stream")
            assert engine.aborted == engine.added
            key = await newer.generate("a", spec())
            ids = await added(newer, engine, 2)
            assert ids[0] != ids[1]
            engine.step(TokenOutput(ids[0], 0, (1,), "length"), TokenOutput(ids[1], 0, (2,), "length"))
            assert await newer.finished(key) == [2]


@pytest.mark.parametrize(
    "first",
    [
        pb.RouterFrame(heartbeat=pb.RouterHeartbeat()),
        pb.RouterFrame(hello=pb.AttachHello(heartbeat_interval_s=1, heartbeat_timeout_s=2)),
        pb.RouterFrame(hello=pb.AttachHello(router_id="r", heartbeat_interval_s=2, heartbeat_timeout_s=1)),
    ],
)
async def test_a_wrong_hello_is_rejected(shell: WorkerShell, first: pb.RouterFrame) -> None:
    async with grpc.aio.insecure_channel(shell.address) as channel:
        call = WorkerStub(channel).Attach(None)
        await call.write(first)  # and no more: grpc.aio tells of a write that comes too late instead of the answer
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_draining_refuses_new_attempts_and_waits_for_the_running(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address) as client:
        running = await client.generate("a", spec())
        [id_] = await added(client, engine, 1)
        assert not await shell.drain(0.01)
        late = await client.generate("b", spec())
        await client.until(lambda: late in client.refused, "the refusal")
        assert client.refused[late].code == "draining"
        engine.step(TokenOutput(id_, 0, (5,), "length"))
        assert await client.finished(running) == [5]
        assert await shell.drain(5.0)


async def test_heartbeats_carry_blocks_and_step_times(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address) as client:
        engine.step(TokenOutput("unknown", 0, (5,), None))
        await client.until(lambda: bool(client.heartbeats) and client.heartbeats[-1].timing.samples == 1, "a sample")
        timing = client.heartbeats[-1].timing
        assert timing.base_s + timing.per_decode_seq_s == pytest.approx(0.01)
        assert client.heartbeats[-1].blocks.total == 8
        assert [beat.sequence for beat in client.heartbeats] == list(range(len(client.heartbeats)))


async def test_lost_blocks_turn_health_bad(shell: WorkerShell, engine: FakeEngine) -> None:
    assert shell.health()["healthy"]
    engine.blocks = BlockCounts(7, 0, 0, 0, 0, 8)
    assert not shell.health()["healthy"]


async def test_stop_ends_streams_and_the_engine(shell: WorkerShell, engine: FakeEngine) -> None:
    async with WorkerClient(shell.address) as client:
        await client.attached()
        await shell.stop()
        await client.until(lambda: client.ended is not None, "the end")
    assert not engine.running
    await shell.wait_closed()
