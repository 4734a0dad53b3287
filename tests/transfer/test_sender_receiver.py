"""Both links over a gloo pair in one process: content, damage, order, failure and close."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kv_transfer.connection import DECODE_RANK, connect
from kv_transfer.events import Pack, Packed, SendDone, StartRecv, StartSend
from kv_transfer.fingerprint import Salts
from kv_transfer.messages import LeaseKey, Segment
from kv_transfer.packing import TorchPacker
from kv_transfer.rendezvous import StoreServer
from tests.transfer.io_support import (
    ATTEMPT,
    CPU,
    EPOCH,
    LAYOUT,
    WAIT_S,
    DecodeEnd,
    PrefillEnd,
    gloo_pair,
    linked_pair,
    lost,
)

torch.set_num_threads(1)

LEASE = LeaseKey(3, 1)
SEGMENT = Segment(1, 3, 4, 7)
SOURCE, TARGET = [9, 2, 5], [0, 11, 6]
NUM_BYTES = LAYOUT.segment_bytes(2, 3)


def transfer(decode: DecodeEnd, prefill: PrefillEnd, seq: int, slot: int = 0) -> tuple[int, ...]:
    """Pack, send and receive SEGMENT; the fingerprints that its Chunk would carry."""
    fingerprints = prefill.pack(seq, slot, SEGMENT, SOURCE, LEASE).fingerprints
    decode.start_recv(seq, slot, SEGMENT)
    prefill.start_send(seq, slot, SEGMENT)
    decode.received(seq)
    prefill.sent(seq)
    return fingerprints


def assert_untouched(decode: DecodeEnd) -> None:
    assert bool(decode.cache.isnan().all())


def test_blocks_arrive_where_they_belong_and_nowhere_else() -> None:
    with linked_pair() as (decode, prefill):
        fingerprints = transfer(decode, prefill, seq=0)
        assert decode.unpack(0, 0, SEGMENT, TARGET, LEASE, fingerprints)
        assert torch.equal(decode.cache[1:3][:, :, TARGET], prefill.cache[1:3][:, :, SOURCE])
        decode.cache[1:3][:, :, TARGET] = float("nan")
        assert_untouched(decode)
        assert decode.staging.in_use == prefill.staging.in_use == 0


def test_a_message_goes_before_the_unpack_of_the_one_before_it() -> None:
    """And an unpack before no kernel of decode's. The device keeps the order, where there is one."""
    with linked_pair() as (decode, prefill):
        lanes = (decode.link._wire, prefill.link._wire, prefill.link._copy, decode.link._copy)
        assert [lane.stream._priority for lane in lanes] == [-1, -1, -1, 0]


def test_many_chunks_over_few_slots() -> None:
    with linked_pair() as (decode, prefill):
        for seq in range(30):
            segment = Segment(seq % 3, seq % 3 + 1, seq % 8, seq % 8 + 4)
            source, target = [(seq + i) % 12 for i in range(4)], [(7 * seq + 5 * i) % 12 for i in range(4)]
            fingerprints = prefill.pack(seq, seq % 3, segment, source, LEASE).fingerprints
            decode.start_recv(seq, (seq + 1) % 3, segment)
            prefill.start_send(seq, seq % 3, segment)
            decode.received(seq)
            prefill.sent(seq)
            assert decode.unpack(seq, (seq + 1) % 3, segment, target, LEASE, fingerprints)
            layer = segment.layer_start
            assert torch.equal(decode.cache[layer][:, target], prefill.cache[layer][:, source])


@pytest.mark.parametrize("position", [0, NUM_BYTES // 2, NUM_BYTES - 1])
def test_a_bit_flipped_in_staging_is_found_and_nothing_is_scattered(position: int) -> None:
    with linked_pair() as (decode, prefill):
        fingerprints = transfer(decode, prefill, seq=0)
        decode.staging.slot(0)[position] ^= 1
        assert not decode.unpack(0, 0, SEGMENT, TARGET, LEASE, fingerprints)
        assert_untouched(decode)


def test_what_an_earlier_chunk_left_in_the_slot_does_not_verify() -> None:
    with linked_pair() as (decode, prefill):
        transfer(decode, prefill, seq=0)
        expected = prefill.pack(1, 1, SEGMENT, [1, 3, 4], LEASE).fingerprints
        assert not decode.unpack(1, 0, SEGMENT, TARGET, LEASE, expected)
        assert_untouched(decode)


def test_the_fingerprints_of_an_earlier_chunk_do_not_vouch_for_a_later_one() -> None:
    with linked_pair() as (decode, prefill):
        stale = transfer(decode, prefill, seq=0)
        assert not decode.unpack(1, 0, SEGMENT, TARGET, LEASE, stale)
        assert_untouched(decode)


def test_the_chunk_of_another_lease_does_not_verify() -> None:
    with linked_pair() as (decode, prefill):
        fingerprints = transfer(decode, prefill, seq=0)
        assert not decode.unpack(0, 0, SEGMENT, TARGET, LeaseKey(3, 2), fingerprints)
        assert_untouched(decode)


def test_a_truncated_send_into_a_used_slot_is_found() -> None:
    with gloo_pair() as (receiving, sending):
        decode, prefill = DecodeEnd(receiving), PrefillEnd(sending)
        transfer(decode, prefill, seq=0)
        expected = prefill.pack(1, 1, Segment(1, 3, 4, 7), [1, 2, 3], LEASE).fingerprints
        decode.start_recv(1, 0, SEGMENT)
        sending.start_send(prefill.staging.slot(1)[: NUM_BYTES - 64]).wait()
        decode.received(1)
        assert not decode.unpack(1, 0, SEGMENT, TARGET, LEASE, expected)
        assert_untouched(decode)
        close_both(decode, prefill)


def close_both(decode: DecodeEnd, prefill: PrefillEnd) -> None:
    with ThreadPoolExecutor(2) as pool:
        for closed in [pool.submit(decode.link.close), pool.submit(prefill.link.close)]:
            closed.result(WAIT_S)


def test_packing_goes_on_while_a_send_waits_for_its_receiver() -> None:
    with linked_pair() as (decode, prefill):
        prefill.pack(0, 0, SEGMENT, SOURCE, LEASE)
        prefill.start_send(0, 0, SEGMENT)
        prefill.pack(1, 1, SEGMENT, SOURCE, LEASE)
        assert prefill.staging.in_use == 1
        decode.start_recv(0, 0, SEGMENT)
        prefill.sent(0)


def test_operations_run_in_the_order_of_their_start_whoever_is_waited_for_first() -> None:
    with gloo_pair() as (receiving, sending), ThreadPoolExecutor(1) as pool:
        first, second = (torch.zeros(4, dtype=torch.uint8) for _ in range(2))
        receives = [receiving.start_recv(first), receiving.start_recv(second)]
        waiting = pool.submit(receives[1].follow)
        for value in (1, 2):
            sending.start_send(torch.full((4,), value, dtype=torch.uint8)).wait()
        waiting.result(WAIT_S)
        receives[0].wait()
        assert (first[0].item(), second[0].item()) == (1, 2)


# ---- failures


def test_a_slot_that_an_epoch_before_may_still_touch_is_not_used() -> None:
    with linked_pair() as (decode, _):
        assert decode.staging.hold(1, "the epoch before")
        decode.start_recv(0, 1, SEGMENT)
        assert "still in use" in lost(decode.events).reason
        decode.staging.release(1)
        assert decode.staging.hold(1, EPOCH)


def test_an_unpack_of_what_was_never_received_is_refused() -> None:
    with linked_pair() as (decode, prefill):
        fingerprints = prefill.pack(0, 0, SEGMENT, SOURCE, LEASE).fingerprints
        decode.ask_unpack(0, 0, SEGMENT, TARGET, LEASE, fingerprints)
        assert "was not received" in lost(decode.events).reason
        assert_untouched(decode)


def test_a_lost_peer_is_reported_once_and_later_jobs_are_dropped() -> None:
    with linked_pair(operation_timeout_s=30.0) as (decode, prefill):
        for seq in range(3):
            decode.start_recv(seq, seq, SEGMENT)
        prefill.link.close()
        event = lost(decode.events, 5.0)
        assert (event.peer, event.epoch) == ("d", EPOCH)
        decode.start_recv(3, 0, SEGMENT)
        decode.link.close()
        assert decode.events.empty()
        assert decode.staging.in_use == 0


def test_a_killed_peer_is_reported_before_the_operation_timeout() -> None:
    server = StoreServer("127.0.0.1")
    command = [sys.executable, "-m", "tests.transfer.io_peer", "127.0.0.1", str(server.port), "e"]
    peer = subprocess.Popen(command)
    try:
        transport = connect(
            "gloo",
            server.store,
            "e",
            DECODE_RANK,
            host="127.0.0.1",
            device=CPU,
            connect_timeout_s=60.0,
            operation_timeout_s=20.0,
        )
        decode = DecodeEnd(transport)
        decode.link.start_recv(StartRecv("d", EPOCH, 0, 0, 1))
        decode.received(0)
        decode.start_recv(1, 1, SEGMENT)
        start = time.monotonic()
        peer.kill()
        lost(decode.events)
        assert time.monotonic() - start < 15.0
        decode.link.close()
    finally:
        peer.kill()
        peer.wait()


def test_close_under_a_blocked_receive_is_bounded_and_silent() -> None:
    with gloo_pair(operation_timeout_s=1.0) as (receiving, _):
        decode = DecodeEnd(receiving)
        decode.start_recv(0, 0, SEGMENT)
        decode.start_recv(1, 1, SEGMENT)
        start = time.monotonic()
        decode.link.close()
        assert time.monotonic() - start < 10.0
        assert decode.events.empty()
        assert decode.staging.in_use == 0
        before = decode.staging.slot(0).clone()
        assert torch.equal(before, torch.zeros_like(before))
        decode.link.close()


def test_a_send_of_another_size_than_was_packed_is_refused() -> None:
    with linked_pair() as (_, prefill):
        prefill.pack(0, 0, SEGMENT, SOURCE, LEASE)
        prefill.link.start_send(StartSend("p", EPOCH, 0, 0, NUM_BYTES + 4))
        assert "packed bytes" in lost(prefill.events).reason


def test_a_send_of_a_slot_that_was_not_packed_is_refused() -> None:
    with linked_pair() as (_, prefill):
        prefill.start_send(0, 0, SEGMENT)
        assert "None packed bytes" in lost(prefill.events).reason


@pytest.mark.parametrize("num_bytes", [0, 1 << 30])
def test_a_receive_that_no_slot_can_hold_is_refused(num_bytes: int) -> None:
    with linked_pair() as (decode, _):
        decode.link.start_recv(StartRecv("d", EPOCH, 0, 0, num_bytes))
        assert "a slot has" in lost(decode.events).reason


class BrokenPacker(TorchPacker):
    """Fails with an error that no caller foresees."""

    def pack(
        self, kv_cache: torch.Tensor, segment: Segment, block_ids: Sequence[int], out: torch.Tensor, salts: Salts
    ) -> list[int]:
        raise KeyError("unforeseen")


def test_an_unforeseen_error_ends_the_epoch_instead_of_the_thread() -> None:
    with gloo_pair() as (_, sending):
        prefill = PrefillEnd(sending, packer=BrokenPacker())
        prefill.link.pack(Pack("p", EPOCH, 0, 0, ATTEMPT, LEASE, SEGMENT), SOURCE, None)
        assert "KeyError" in lost(prefill.events).reason
        prefill.link.close()


class SlowPacker(TorchPacker):
    """Packs when the test allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.allowed = threading.Event()

    def pack(
        self, kv_cache: torch.Tensor, segment: Segment, block_ids: Sequence[int], out: torch.Tensor, salts: Salts
    ) -> list[int]:
        self.entered.set()
        self.allowed.wait(WAIT_S)
        return super().pack(kv_cache, segment, block_ids, out, salts)


def test_close_returns_only_after_the_copy_in_progress() -> None:
    with gloo_pair() as (_, sending), ThreadPoolExecutor(1) as pool:
        packer = SlowPacker()
        prefill = PrefillEnd(sending, packer=packer)
        prefill.link.pack(Pack("p", EPOCH, 0, 0, ATTEMPT, LEASE, SEGMENT), SOURCE, None)
        assert packer.entered.wait(WAIT_S)
        closed = pool.submit(prefill.link.close)
        with pytest.raises(TimeoutError):
            closed.result(0.2)
        packer.allowed.set()
        closed.result(WAIT_S)
        assert prefill.staging.in_use == 0
        assert not any(isinstance(event, Packed | SendDone) for event in list(prefill.events.queue))
