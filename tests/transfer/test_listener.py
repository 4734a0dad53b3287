"""What connects to a decode worker and is no prefill worker, or leaves before it has joined: nothing of it stays."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from baton.common.errors import ConfigError
from baton.worker.frame_stream import FrameStream
from baton.worker.shell import WorkerShell
from decode_worker import listener
from decode_worker.handover import DecodeHalf
from kv_transfer.messages import Finish, LeaseKey
from kv_transfer.wire import Hello, Refused, Welcome, parse_decode_frame, prefill_frame
from protos.transfer_pb2 import DecodeFrame, PrefillFrame
from tests.support.eventually import eventually
from tests.transfer.handover_cluster import config, worker

WAIT_S = 20.0
Stream = FrameStream[DecodeFrame, PrefillFrame]


@pytest.fixture
async def decode(model: Path) -> AsyncIterator[WorkerShell]:
    async with worker(config(model), "decode") as shell:
        yield shell


async def dial(decode: WorkerShell) -> Stream:
    host, _, port = decode.transfer_address.rpartition(":")
    stream = Stream(DecodeFrame)
    await asyncio.get_running_loop().create_connection(lambda: stream, host, int(port))
    return stream


async def ended(stream: Stream) -> None:
    """The worker has closed it, and said nothing."""
    async with asyncio.timeout(WAIT_S):
        with pytest.raises((ConnectionError, StopAsyncIteration)):
            await anext(stream)


def hello(decode: WorkerShell, worker_id: str) -> PrefillFrame:
    return prefill_frame(Hello(worker_id, decode._engine.layout))


async def test_a_hello_is_small(decode: WorkerShell) -> None:
    """A stranger cannot make the worker keep megabytes."""
    host, _, port = decode.transfer_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write((listener.MAX_HELLO_BYTES + 1).to_bytes(4, "big"))
    assert await asyncio.wait_for(reader.read(1), WAIT_S) == b""
    writer.close()


async def test_strangers_beyond_a_number_are_turned_away(decode: WorkerShell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_STRANGERS", 2)
    strangers = [await dial(decode) for _ in range(2)]
    await ended(await dial(decode))
    for stranger in strangers:
        stranger.close()
    [half] = [half for half in decode._halves if isinstance(half, DecodeHalf)]
    await eventually(lambda: not half._listener._num_strangers)
    stream = await dial(decode)
    stream.send(hello(decode, "known"))
    assert isinstance(parse_decode_frame(await asyncio.wait_for(anext(stream), WAIT_S)), Welcome)
    stream.close()


async def test_a_setting_that_rules_all_peers_out_is_told_to_them(
    decode: WorkerShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_small(*_: object) -> object:
        raise ConfigError("transfer.slot_bytes", "is smaller than a block")

    monkeypatch.setattr("baton.worker.pair.StagingPool", too_small)
    stream = await dial(decode)
    stream.send(hello(decode, "unlucky"))
    answer = parse_decode_frame(await asyncio.wait_for(anext(stream), WAIT_S))
    assert isinstance(answer, Refused)
    assert "smaller than a block" in answer.message
    await ended(stream)
    assert decode.health()["healthy"]


async def test_who_says_nothing_is_turned_away(decode: WorkerShell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HELLO_TIMEOUT_S", 0.1)
    await ended(await dial(decode))


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b"\x00\x00\x00\x00", b""], ids=["HTTP", "long", "empty", "none"]
)
async def test_who_speaks_otherwise_is_turned_away(decode: WorkerShell, data: bytes) -> None:
    host, _, port = decode.transfer_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    writer.write_eof()
    with contextlib.suppress(ConnectionError):  # what was sent and not read makes it a reset
        assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
    writer.close()


async def test_who_begins_with_anything_but_a_hello_is_turned_away(decode: WorkerShell) -> None:
    stream = await dial(decode)
    stream.send(prefill_frame(Finish(LeaseKey(1, 1))))
    await ended(stream)


async def test_who_cannot_exchange_kv_is_told_why(decode: WorkerShell) -> None:
    stream = await dial(decode)
    layout = replace(decode._engine.layout, block_size=999)
    stream.send(prefill_frame(Hello("stranger", layout)))
    async with asyncio.timeout(WAIT_S):
        answer = parse_decode_frame(await anext(stream))
    assert isinstance(answer, Refused)
    assert "block_size" in answer.message
    await ended(stream)


async def test_who_leaves_before_it_has_joined_leaves_nothing(decode: WorkerShell) -> None:
    [half] = [half for half in decode._halves if isinstance(half, DecodeHalf)]
    stream = await dial(decode)
    stream.send(hello(decode, "fickle"))
    async with asyncio.timeout(WAIT_S):
        assert isinstance(parse_decode_frame(await anext(stream)), Welcome)
        assert half._pairs._staging
        [attending] = [task for task in half._tasks._tasks if "stream" in task.get_name()]
        stream.close()
        await asyncio.wait({attending})
    assert [half._pairs._staging, half._pairs._pairs, half._listener._ahead._pairs] == [{}, {}, set()]
