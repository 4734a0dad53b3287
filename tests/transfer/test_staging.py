"""The memory of staging: taken without holding up who only counts slots, and what is said when it is not there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kv_transfer import staging
from kv_transfer.transport import TransferError
from tests.transfer.io_support import EPOCH, WAIT_S, staging_pool


def test_slots_are_held_and_counted_while_their_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taking, allowed = threading.Event(), threading.Event()

    def slow(num_slots: int, stride: int, _: torch.device) -> torch.Tensor:
        taking.set()
        assert allowed.wait(WAIT_S)
        return torch.zeros(num_slots, stride, dtype=torch.uint8)

    monkeypatch.setattr(staging, "_zeros", slow)
    pool = staging_pool()
    with ThreadPoolExecutor(2) as threads:
        slot = threads.submit(pool.slot, 0)
        assert taking.wait(WAIT_S)
        assert threads.submit(pool.hold, 0, EPOCH).result(WAIT_S)
        assert pool.in_use == 1
        allowed.set()
        assert slot.result(WAIT_S).numel() == pool.slot_bytes


def test_memory_that_is_not_there_is_told_with_what_to_change(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(staging, "_zeros", full)
    with pytest.raises(TransferError, match=r"no memory for 3 staging slots.*transfer\.num_pairs"):
        staging_pool().slot(0)
    assert "transfer.num_pairs" in caplog.text
