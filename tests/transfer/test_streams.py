"""Who uses which CUDA stream, with stand-ins for torch's."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch

from kv_transfer import streams
from kv_transfer.link import TransferStream

DEVICE = torch.device("cuda", 0)


class FakeStream:
    def synchronize(self) -> None: ...


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, int]]:
    """Of each stream that torch was asked for, the device and the priority."""
    asked: list[tuple[torch.device, int]] = []

    def make(device: torch.device, priority: int) -> object:
        asked.append((device, priority))
        return FakeStream()

    monkeypatch.setattr(streams, "_idle", defaultdict(list))
    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    return asked


def test_epochs_that_follow_each_other_use_the_same_streams(made: list[tuple[torch.device, int]]) -> None:
    for _ in range(3):
        lanes = [TransferStream(DEVICE, -1) for _ in range(2)]
        for lane in lanes * 2:
            lane.close()
    assert made == [(DEVICE, -1)] * 2


def test_no_stream_has_two_users_nor_another_priority_than_was_asked_for() -> None:
    first, second = streams.take(DEVICE), streams.take(DEVICE)
    assert first is not second
    streams.give_back(first, DEVICE)
    assert streams.take(DEVICE, -1) is not first
    assert streams.take(DEVICE) is first


def test_a_stream_is_not_used_again_after_a_failure(made: list[tuple[torch.device, int]]) -> None:
    with pytest.raises(ValueError, match="amid"), streams.borrowed(DEVICE):
        raise ValueError("amid")
    for _ in range(2):
        with streams.borrowed(DEVICE):
            pass
    assert made == [(DEVICE, 0)] * 2
