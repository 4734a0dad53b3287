"""When CUDA events fired, with stand-ins for streams and events."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from kv_transfer import device_clock, streams
from kv_transfer.device_clock import DeviceClock

DEVICE = torch.device("cuda", 0)
DELAYS_S = (0.4, 0.1, 0.002, 0.3, 0.2)  # between the device's and the host's idea of an event


class FakeDevice:
    """A clock that device and host share, and how late the host sees each event."""

    def __init__(self) -> None:
        self.now = 100.0
        self.num_streams = 0
        self.is_busy = False
        self.is_stuck = False
        self.delays: Iterator[float] = iter(DELAYS_S * 10)


class FakeStream:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        device.num_streams += 1

    def query(self) -> bool:
        return not self._device.is_busy


class FakeEvent:
    """Fires half way between its record and the moment at which the host has seen it."""

    def __init__(self, device: FakeDevice, at: float = 0.0) -> None:
        self._device = device
        self.at = at

    def record(self, stream: FakeStream) -> None:
        delay = next(self._device.delays)
        self.at = self._device.now + delay / 4
        self._device.now += delay

    def query(self) -> bool:
        self._device.now += 0.0001
        return not self._device.is_stuck

    def elapsed_time(self, other: FakeEvent) -> float:
        return (other.at - self.at) * 1e3


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(streams, "take", lambda _: FakeStream(fake))
    monkeypatch.setattr(device_clock, "timing_event", lambda: FakeEvent(fake))
    monkeypatch.setattr(device_clock, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def time_of(clock: DeviceClock, device: FakeDevice, at: float) -> float | None:
    return clock.time_of(cast(torch.cuda.Event, FakeEvent(device, at)))


def test_the_tightest_comparison_counts(device: FakeDevice) -> None:
    clock = DeviceClock(DEVICE)
    for at in (99.0, 101.0):
        assert time_of(clock, device, at) == pytest.approx(at, abs=0.001)


def test_a_clock_takes_one_stream(device: FakeDevice) -> None:
    clock = DeviceClock(DEVICE)
    for _ in range(3):
        assert time_of(clock, device, device.now) is not None
        device.now += 10.0
    assert device.num_streams == 1


def test_it_waits_for_nobody_who_uses_its_stream(device: FakeDevice) -> None:
    clock = DeviceClock(DEVICE)
    device.is_busy = True
    assert time_of(clock, device, device.now) is None
    device.is_busy = False
    assert time_of(clock, device, device.now) is not None
    device.now, device.is_busy, device.delays = device.now + 10.0, True, iter(())
    assert time_of(clock, device, device.now) == pytest.approx(device.now, abs=0.001)


def test_an_event_that_does_not_fire_is_given_up_and_the_reference_stays(device: FakeDevice) -> None:
    clock = DeviceClock(DEVICE)
    assert time_of(clock, device, device.now) is not None
    device.now += 10.0
    device.is_stuck, before = True, device.now
    assert time_of(clock, device, before) == pytest.approx(before, abs=0.002)
    assert device.now < before + 1.0
