"""What the injector does to streams of frames: to a router's and to a peer's apart, and as its settings are now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import torch

from baton.common.config import ChaosConfig, FaultSettings
from baton.common.errors import ConfigError
from baton.worker.chaos_hooks import Injector, make_injector


def injector(**settings: float) -> Injector:
    return make_injector(ChaosConfig(enabled=True, faults=FaultSettings.model_validate(settings)))


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number
        await asyncio.sleep(0)


async def read(frames: AsyncIterator[int]) -> list[int]:
    return [frame async for frame in frames]


async def test_frames_of_a_router_are_never_lost_nor_doubled_nor_reordered() -> None:
    disturbed = injector(frame_loss=0.5, frame_duplication=0.5, router_jitter_s=0.02)
    assert await read(disturbed.router_frames(numbers(50))) == list(range(50))
    assert await read(disturbed.frames(numbers(50))) != list(range(50))


async def test_a_delay_is_that_of_its_own_kind_of_stream() -> None:
    disturbed = injector(router_delay_s=1.0)
    start = time.monotonic()
    assert await read(disturbed.frames(numbers(3))) == [0, 1, 2]
    assert time.monotonic() - start < 1.0
    assert await read(disturbed.router_frames(numbers(3))) == [0, 1, 2]
    assert time.monotonic() - start >= 1.0


async def test_a_broken_stream_ends_with_what_came_before() -> None:
    disturbed = injector(router_break=0.2)
    read_frames = await read(disturbed.router_frames(numbers(200)))
    assert read_frames == list(range(len(read_frames)))
    assert len(read_frames) < 200
    assert await read(disturbed.frames(numbers(200))) == list(range(200))


async def test_what_breaks_a_stream_is_told_to_its_reader() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        await read(injector(router_delay_s=0.01).router_frames(broken()))


SENT = bytes(range(1, 9))
HELD = bytes([200] * 8)
SPOILT = {"stale": HELD, "truncation": SENT[:4] + HELD[4:]}


class Arrived:
    """A transport through which SENT has just come."""

    def start_send(self, buffer: torch.Tensor) -> Arrived:
        raise AssertionError(buffer)

    def start_recv(self, buffer: torch.Tensor) -> Arrived:
        buffer.copy_(torch.tensor(list(SENT), dtype=torch.uint8))
        return self

    event = None

    def follow(self) -> None: ...

    def wait(self) -> None: ...

    def close(self) -> None: ...


def received(**settings: float) -> bytes:
    buffer = torch.tensor(list(HELD), dtype=torch.uint8)
    transfer = injector(**settings).transport(Arrived()).start_recv(buffer)
    transfer.follow()
    unpacked = bytes(buffer.tolist())
    transfer.wait()
    assert bytes(buffer.tolist()) == unpacked, "spoilt twice, or only after the unpack"
    return unpacked


def test_a_chunk_is_spoilt_as_asked() -> None:
    assert received() == SENT
    assert {fault: received(**{fault: 1.0}) for fault in SPOILT} == SPOILT
    flipped = received(corruption=1.0)
    assert sum((a ^ b).bit_count() for a, b in zip(flipped, SENT, strict=True)) == 1


def test_what_the_device_orders_is_spoilt_on_the_stream_that_follows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that waits for a receive has the model's stream as its current one."""
    monkeypatch.setattr(Arrived, "event", object())
    buffer = torch.tensor(list(HELD), dtype=torch.uint8)
    transfer = injector(stale=1.0).transport(Arrived()).start_recv(buffer)
    transfer.wait()
    assert bytes(buffer.tolist()) == SENT
    transfer.follow()
    assert bytes(buffer.tolist()) == HELD


async def test_nothing_is_disturbed_nor_can_be_unless_chaos_is_enabled() -> None:
    off = make_injector(ChaosConfig(enabled=False, faults=FaultSettings(router_break=1.0, frame_loss=1.0)))
    assert await read(off.router_frames(numbers(5))) == await read(off.frames(numbers(5))) == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"chaos\.enabled"):
        off.set(FaultSettings())
