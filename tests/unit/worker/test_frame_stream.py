"""Frames over real sockets: whole, in order, whatever the pieces; what is none ends the stream and says why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.worker import frame_stream
from baton.worker.frame_stream import MAX_FRAME_BYTES, FrameStream
from kv_transfer.wire import WireError
from protos import transfer_pb2 as pb
from tests.support.eventually import eventually

Stream = FrameStream[pb.PrefillFrame, pb.PrefillFrame]
WAIT_S = 20.0


@dataclass
class Ends:
    """A stream at the end that was dialled, and the other end as raw bytes."""

    stream: Stream
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    opened: asyncio.Queue[Stream] = asyncio.Queue()
    server = await asyncio.get_running_loop().create_server(
        lambda: Stream(pb.PrefillFrame, opened.put_nowait), "127.0.0.1", 0
    )
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    stream = await opened.get()
    try:
        yield Ends(stream, reader, writer)
    finally:
        writer.transport.abort()
        stream.close()
        await asyncio.wait_for(stream.lost.wait(), WAIT_S)
        server.close()


@asynccontextmanager
async def dialled(opened: asyncio.Queue[Stream]) -> AsyncIterator[Stream]:
    """Both ends are streams."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stream(pb.PrefillFrame, opened.put_nowait), "127.0.0.1", 0)
    stream = Stream(pb.PrefillFrame)
    await loop.create_connection(lambda: stream, *server.sockets[0].getsockname())
    try:
        yield stream
    finally:
        stream.close()
        await asyncio.wait_for(stream.lost.wait(), WAIT_S)
        server.close()


def abort(reason: str, lease: int = 0) -> pb.PrefillFrame:
    return pb.PrefillFrame(abort=pb.TransferAbort(lease=lease, reason=reason))


def to_bytes(*frames: pb.PrefillFrame) -> bytes:
    return b"".join(len(data := frame.SerializeToString()).to_bytes(4, "big") + data for frame in frames)


async def read_all(stream: Stream) -> list[pb.PrefillFrame]:
    async with asyncio.timeout(WAIT_S):
        return [frame async for frame in stream]


async def until_broken(stream: Stream) -> tuple[list[pb.PrefillFrame], Exception]:
    """The frames before the stream broke, and why it did."""
    frames: list[pb.PrefillFrame] = []
    try:
        async with asyncio.timeout(WAIT_S):
            async for frame in stream:
                frames.append(frame)
    except (ConnectionError, WireError) as error:
        return frames, error
    raise AssertionError("the stream ended as if all were well")


@given(
    st.lists(st.integers(0, 300), max_size=8),
    st.lists(st.integers(1, 200), min_size=1, max_size=8),
)
def test_frames_come_whole_and_in_order_whatever_the_pieces(sizes: list[int], pieces: list[int]) -> None:
    frames = [abort("x" * size, number) for number, size in enumerate(sizes)]

    async def exchange() -> list[pb.PrefillFrame]:
        stream = Stream(pb.PrefillFrame)
        stream.connection_made(asyncio.Transport())
        data, place = to_bytes(*frames), 0
        while place < len(data):
            for piece in pieces:
                if place < len(data):
                    stream.data_received(data[place : place + piece])
                    place += piece
        stream.connection_lost(None)
        return await read_all(stream)

    assert asyncio.run(exchange()) == frames


async def test_both_ends_say_what_they_want_and_close() -> None:
    opened: asyncio.Queue[Stream] = asyncio.Queue()
    said = [abort("x" * size, size) for size in (0, 1, 100_000, 3_000_000)]
    async with dialled(opened) as stream:
        other = await opened.get()
        for frame in said:
            stream.send(frame)
        assert [await anext(other) for _ in said] == said
        other.send(abort("enough"))
        other.close()
        assert await read_all(stream) == [abort("enough")]
        stream.send(abort("too late, and nobody minds"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((MAX_FRAME_BYTES + 1).to_bytes(4, "big"), f"frame announces {MAX_FRAME_BYTES + 1} bytes"),
        (b"\x00\x00\x00\x02\xff\xff", "frame is no PrefillFrame"),
    ],
    ids=["too long", "nonsense"],
)
async def test_what_is_no_frame_ends_the_stream_behind_those_that_are(data: bytes, message: str) -> None:
    async with ends() as at:
        at.writer.write(to_bytes(abort("good")) + data + to_bytes(abort("never read")))
        frames, error = await until_broken(at.stream)
        assert frames == [abort("good")]
        assert isinstance(error, WireError)
        assert message in str(error)
        with pytest.raises((ConnectionError, EOFError)):
            await asyncio.wait_for(at.reader.readexactly(1), WAIT_S)


async def test_an_end_amid_a_frame_is_no_good_end() -> None:
    async with ends() as at:
        at.writer.write(to_bytes(abort("whole"), abort("half"))[:-1])
        at.writer.close()
        frames, error = await until_broken(at.stream)
        assert frames == [abort("whole")]
        assert "amid a frame" in str(error)


async def test_what_a_peer_reads_late_is_not_lost() -> None:
    opened: asyncio.Queue[Stream] = asyncio.Queue()
    count = 40
    async with dialled(opened) as stream:
        other = await opened.get()
        for number in range(count):
            stream.send(abort("x" * 1_000_000, number))
        await asyncio.sleep(0)
        assert [(await anext(other)).abort.lease for _ in range(count)] == [*range(count)]


@pytest.mark.parametrize("size", [0, 1000, 1_000_000])
async def test_what_nobody_reads_stays_with_who_sends_it(size: int) -> None:
    """Whether it comes in few frames or in many: a frame takes memory beside its data."""
    opened: asyncio.Queue[Stream] = asyncio.Queue()
    frame = abort("x" * size)
    count = min(200_000, 40_000_000 // (size + 40))
    async with dialled(opened) as stream:
        other = await opened.get()
        for _ in range(count):
            stream.send(frame)
        await eventually(lambda: other._is_paused)
        assert len(other._frames) < min(100_000, 8_000_000 // (size + 1)), "what one read holds, and a little more"
        assert [await anext(other) for _ in range(count)] == [frame] * count


async def test_a_peer_that_reads_nothing_breaks_the_stream_and_takes_no_more_memory() -> None:
    async with ends() as at:
        at.reader._transport.pause_reading()  # type: ignore[attr-defined]
        sent = 0
        while not at.stream.lost.is_set():
            at.stream.send(abort("x" * 1_000_000))
            sent += 1
            assert sent < 200, "what nobody reads piles up"
            await asyncio.sleep(0)
        _, error = await until_broken(at.stream)
        assert f"left {frame_stream._UNSENT_BYTES} bytes unread" in str(error)


async def test_a_peer_that_does_not_read_cannot_keep_a_closed_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_stream, "_FLUSH_S", 0.1)
    async with ends() as at:
        at.reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(20):
            at.stream.send(abort("x" * 1_000_000))
        at.stream.close()
        await asyncio.wait_for(at.stream.lost.wait(), WAIT_S)
