"""The memory of staging: taken without holding up who only counts slots, and what is said when it is not there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from baton.worker.faults import Faults
from baton.worker.pair import Pairs
from baton.worker.tasks import Tasks
from kv_transfer import staging
from kv_transfer.transport import TransferError
from tests.transfer.io_support import CPU, EPOCH, LAYOUT, WAIT_S, staging_pool


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


async def test_a_pair_takes_its_memory_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    takers: list[threading.Thread] = []

    def noted(*_: object) -> torch.Tensor:
        takers.append(threading.current_thread())
        return torch.zeros(1, 1, dtype=torch.uint8)

    monkeypatch.setattr(staging, "_zeros", noted)
    faults = Faults()
    pairs: Pairs[object, Any] = Pairs(lambda _: None, LAYOUT, CPU, Tasks(faults), faults)
    await pairs.staging("later", 3, 1 << 16, when_used=True)
    assert takers == []
    await pairs.staging("now", 3, 1 << 16, when_used=False)
    assert takers != [threading.current_thread()]
    assert len(takers) == 1


async def test_slots_of_a_connection_that_never_had_a_link_are_given_up() -> None:
    faults = Faults()
    pairs: Pairs[object, Any] = Pairs(lambda _: None, LAYOUT, CPU, Tasks(faults), faults)
    pool = await pairs.staging("peer", 3, 1 << 16, when_used=True)
    assert await pairs.staging("peer", 3, 1 << 16, when_used=True) is pool
    pairs.drop_staging("peer")
    assert await pairs.staging("peer", 3, 1 << 16, when_used=True) is not pool


def test_memory_that_is_not_there_is_told_with_what_to_change(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(staging, "_zeros", full)
    with pytest.raises(TransferError, match=r"no memory for 3 staging slots.*transfer\.num_pairs"):
        staging_pool().slot(0)
    assert "transfer.num_pairs" in caplog.text
