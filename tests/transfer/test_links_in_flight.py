"""Links with several operations under way: what is started before what, and what happens at their ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import pytest
import torch

from kv_transfer.device_clock import DeviceClock
from kv_transfer.fingerprint import Salts
from kv_transfer.messages import LeaseKey, Segment
from kv_transfer.packing import TorchPacker
from kv_transfer.transport import TransferError
from tests.transfer.io_support import WAIT_S, DecodeEnd, PrefillEnd, linked_pair, lost

torch.set_num_threads(1)

LEASE = LeaseKey(3, 1)
SEGMENT = Segment(1, 3, 4, 7)
SOURCE, TARGET = [9, 2, 5], [0, 11, 6]


def test_an_unpack_may_be_asked_for_before_the_data_is_there() -> None:
    with linked_pair() as (decode, prefill):
        packed = [prefill.pack(seq, seq, SEGMENT, [seq, seq + 3, seq + 6], LEASE).fingerprints for seq in range(3)]
        for seq, fingerprints in enumerate(packed):
            decode.start_recv(seq, seq, SEGMENT)
            decode.ask_unpack(seq, seq, SEGMENT, [3 * seq, 3 * seq + 1, 3 * seq + 2], LEASE, fingerprints)
        with pytest.raises(queue.Empty):
            decode.events.get(timeout=0.1)
        for seq in range(3):
            prefill.start_send(seq, seq, SEGMENT)
        for seq in range(3):
            assert decode.unpacked(seq)
            target, source = [3 * seq, 3 * seq + 1, 3 * seq + 2], [seq, seq + 3, seq + 6]
            assert torch.equal(decode.cache[1:3][:, :, target], prefill.cache[1:3][:, :, source])
        assert decode.events.empty()
        assert decode.staging.in_use == 0


def test_receives_complete_in_the_order_in_which_they_were_posted() -> None:
    with linked_pair() as (decode, prefill):
        for seq in range(3):
            prefill.pack(seq, seq, SEGMENT, SOURCE, LEASE)
        for seq in range(3):
            decode.start_recv(seq, seq, SEGMENT)
        for seq in range(3):
            prefill.start_send(seq, seq, SEGMENT)
        for seq in range(3):
            decode.received(seq)
            prefill.sent(seq)


class _Held:
    """A transfer that ends when the test says so, and fails if it says that."""

    event: torch.cuda.Event | None = None

    def __init__(self) -> None:
        self.done = threading.Event()
        self.failure = ""
        self.num_waits = 0

    def follow(self) -> None:
        """As on CUDA: what follows is ordered behind it by the device."""

    def wait(self) -> None:
        self.num_waits += 1
        assert self.done.wait(WAIT_S)
        if self.failure:
            raise TransferError(self.failure)


class _HoldingTransport:
    """Starts everything at once and ends nothing by itself."""

    def __init__(self) -> None:
        self.started: queue.Queue[_Held] = queue.Queue()

    def start_send(self, buffer: torch.Tensor) -> _Held:
        held = _Held()
        self.started.put(held)
        return held

    start_recv = start_send

    def close(self) -> None:
        pass


def test_a_send_starts_before_the_one_before_has_ended() -> None:
    transport = _HoldingTransport()
    prefill = PrefillEnd(transport)
    for seq in range(2):
        prefill.pack(seq, seq, SEGMENT, SOURCE, LEASE)
        prefill.start_send(seq, seq, SEGMENT)
    first, second = transport.started.get(timeout=WAIT_S), transport.started.get(timeout=WAIT_S)
    second.done.set()
    assert prefill.staging.in_use == 2
    first.done.set()
    prefill.sent(0)
    prefill.sent(1)
    prefill.link.close()
    assert prefill.staging.in_use == 0


def test_close_waits_for_what_was_started_and_reports_none_of_it() -> None:
    transport = _HoldingTransport()
    decode = DecodeEnd(transport)
    decode.start_recv(0, 0, SEGMENT)
    held = transport.started.get(timeout=WAIT_S)
    closing = threading.Thread(target=decode.link.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    held.done.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert decode.events.empty()
    assert decode.staging.in_use == 0


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> _HoldingTransport:
    """As over NCCL: the end of an operation is an event, behind which the device orders what follows."""
    monkeypatch.setattr(_Held, "event", object())
    monkeypatch.setattr(DeviceClock, "time_of", lambda *_: None)
    return _HoldingTransport()


def test_an_unpack_is_launched_behind_its_receive_without_waiting_for_it(on_device: _HoldingTransport) -> None:
    packer = SeenPacker()
    decode = DecodeEnd(on_device, packer=packer)
    for seq in range(2):
        decode.start_recv(seq, seq, SEGMENT)
        decode.ask_unpack(seq, seq, SEGMENT, TARGET, LEASE, (0, 0, 0))
    assert [packer.started.get(timeout=WAIT_S) for _ in range(2)] == [SEGMENT, SEGMENT]
    assert decode.events.empty()
    for _ in range(2):
        on_device.started.get(timeout=WAIT_S).done.set()
    assert [decode.unpacked(seq) for seq in range(2)] == [False, False]
    decode.link.close()
    assert decode.events.empty()
    assert decode.staging.in_use == 0


def test_a_receive_that_is_launched_before_its_unpack_is_asked_for_has_its_end_told_once(
    on_device: _HoldingTransport,
) -> None:
    decode, launched = DecodeEnd(on_device), threading.Event()
    for seq in range(2):
        decode.start_recv(seq, seq, SEGMENT)
    decode.link._starts.submit(launched.set)
    assert launched.wait(WAIT_S)
    decode.ask_unpack(1, 1, SEGMENT, TARGET, LEASE, (0, 0, 0))
    first, second = on_device.started.get(timeout=WAIT_S), on_device.started.get(timeout=WAIT_S)
    first.done.set()
    decode.received(0)
    second.done.set()
    assert not decode.unpacked(1)
    decode.link.close()
    assert second.num_waits == 1
    assert decode.events.empty()


class SeenPacker(TorchPacker):
    """Tells of each unpack when it is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.started: queue.Queue[Segment] = queue.Queue()

    def unpack(
        self,
        kv_cache: torch.Tensor,
        segment: Segment,
        block_ids: Sequence[int],
        data: torch.Tensor,
        salts: Salts,
        expected: Sequence[int],
    ) -> bool:
        self.started.put(segment)
        return super().unpack(kv_cache, segment, block_ids, data, salts, expected)


def test_of_an_aborted_receive_there_is_no_verdict(on_device: _HoldingTransport) -> None:
    decode = DecodeEnd(on_device)
    decode.start_recv(0, 0, SEGMENT)
    decode.ask_unpack(0, 0, SEGMENT, TARGET, LEASE, (0, 0, 0))
    held = on_device.started.get(timeout=WAIT_S)
    held.failure = "aborted"
    held.done.set()
    assert lost(decode.events).reason == "aborted"
    decode.link.close()
    assert decode.events.empty()
    assert decode.staging.in_use == 0
