"""Rendezvous, the gloo transport within and across processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from baton.common.errors import ConfigError
from kv_transfer.connection import DECODE_RANK, PREFILL_RANK, connect, resolve_backend
from kv_transfer.rendezvous import StoreServer, connect_store
from kv_transfer.transport import PairTransport, TransferError, run_bounded
from tests.transfer.io_support import CPU, WAIT_S, gloo_pair, join, listening_addresses, recv, send

torch.set_num_threads(1)


def bytes_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- rendezvous


def test_store_and_gloo_listen_on_the_given_address_only() -> None:
    before = listening_addresses()
    server = StoreServer("127.0.0.2")
    assert listening_addresses() - before == {"127.0.0.2"}
    client = connect_store("127.0.0.2", server.port, 20.0)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(join, client, "e", PREFILL_RANK, "127.0.0.3")
        decode = join(server.store, "e", DECODE_RANK, "127.0.0.4")
        prefill = other.result(WAIT_S)
    assert listening_addresses() - before == {"127.0.0.2", "127.0.0.3", "127.0.0.4"}
    decode.close()
    prefill.close()
    del client
    server.close()
    assert listening_addresses() == before


def test_a_store_needs_an_address_of_this_machine() -> None:
    with pytest.raises(TransferError, match=r"store on 192\.0\.2\.1"):
        StoreServer("192.0.2.1")


def test_a_closed_store_gives_no_handle() -> None:
    server = StoreServer("127.0.0.1")
    server.close()
    with pytest.raises(TransferError, match="closed"):
        _ = server.store


def test_a_peer_that_does_not_come_is_an_error_in_time_and_holds_up_nobody() -> None:
    store = HashStore()

    def wait_in_vain() -> float:
        start = time.monotonic()
        with pytest.raises(TransferError, match="did not come within"):
            connect(
                "gloo",
                store,
                "lonely",
                DECODE_RANK,
                host="127.0.0.1",
                device=CPU,
                connect_timeout_s=1.0,
                operation_timeout_s=1.0,
            )
        return time.monotonic() - start

    with ThreadPoolExecutor(2) as pool:
        lonely = pool.submit(wait_in_vain)
        other = pool.submit(join, store, "pair", PREFILL_RANK)
        decode = join(store, "pair", DECODE_RANK)
        assert not lonely.done()
        decode.close()
        other.result(WAIT_S).close()
        assert 1.0 <= lonely.result(WAIT_S) < 3.0


def test_connecting_can_be_cancelled() -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(TransferError, match="cancelled"):
        connect(
            "gloo",
            HashStore(),
            "e",
            DECODE_RANK,
            host="127.0.0.1",
            device=CPU,
            connect_timeout_s=60.0,
            operation_timeout_s=1.0,
            cancel=cancel,
        )


@pytest.mark.parametrize("backend", ["mpi", "nccl"])
def test_a_backend_that_cannot_work_here_is_a_configuration_error(backend: str) -> None:
    store = HashStore()
    store.set("e/here/1", "1")
    with pytest.raises(ConfigError, match=r"transfer\.backend"):
        connect(
            backend,
            store,
            "e",
            DECODE_RANK,
            host="127.0.0.1",
            device=CPU,
            connect_timeout_s=1.0,
            operation_timeout_s=1.0,
        )


# ---- gloo


def test_bytes_arrive_in_order() -> None:
    messages = [bytes_of(size, seed) for seed, size in enumerate([1, 4096, 3 << 20])]
    with gloo_pair() as (decode, prefill), ThreadPoolExecutor(1) as pool:
        sent = [pool.submit(send, prefill, message) for message in messages]
        for message in messages:
            buffer = torch.zeros_like(message)
            decode.start_recv(buffer).wait()
            assert torch.equal(buffer, message)
        for each in sent:
            each.result(WAIT_S)


def test_an_operation_without_a_partner_ends_at_its_timeout_and_ends_the_epoch() -> None:
    with gloo_pair(operation_timeout_s=0.5) as (decode, prefill):
        start = time.monotonic()
        with pytest.raises(TransferError, match="recv of 8 bytes"):
            decode.start_recv(torch.zeros(8, dtype=torch.uint8)).wait()
        assert 0.4 < time.monotonic() - start < 10.0
        with pytest.raises(TransferError, match="closed"):
            decode.start_recv(torch.zeros(8, dtype=torch.uint8)).wait()
        with pytest.raises(TransferError, match="send of 8 bytes"):
            prefill.start_send(torch.zeros(8, dtype=torch.uint8)).wait()


def test_close_under_a_blocked_receive_ends_both_within_the_operation_timeout() -> None:
    with gloo_pair(operation_timeout_s=1.0) as (decode, _), ThreadPoolExecutor(1) as pool:
        receive = pool.submit(recv, decode, torch.zeros(8, dtype=torch.uint8))
        with pytest.raises(TimeoutError):
            receive.result(0.2)
        start = time.monotonic()
        decode.close()
        assert time.monotonic() - start < 10.0
        with pytest.raises(TransferError, match="recv of 8 bytes"):
            receive.result(WAIT_S)


def test_the_peers_close_ends_a_blocked_receive_at_once() -> None:
    with gloo_pair(operation_timeout_s=30.0) as (decode, prefill), ThreadPoolExecutor(1) as pool:
        receive = pool.submit(recv, decode, torch.zeros(8, dtype=torch.uint8))
        prefill.close()
        with pytest.raises(TransferError):
            receive.result(5.0)


def test_a_closed_end_refuses_and_closes_again() -> None:
    with gloo_pair() as (decode, prefill):
        for end in (decode, prefill):
            end.close()
            end.close()
            with pytest.raises(TransferError, match="closed"):
                end.start_send(bytes_of(1)).wait()


def test_a_new_epoch_works_after_a_failed_one() -> None:
    store = HashStore()
    ends: list[PairTransport] = []
    with ThreadPoolExecutor(1) as pool:
        for epoch in ("first", "second"):
            other = pool.submit(join, store, epoch, PREFILL_RANK)
            ends = [join(store, epoch, DECODE_RANK, operation_timeout_s=0.2), other.result(WAIT_S)]
            if epoch == "first":
                with pytest.raises(TransferError):
                    ends[0].start_recv(torch.zeros(1, dtype=torch.uint8)).wait()
                for end in ends:
                    end.close()
        message, buffer = bytes_of(100), torch.zeros(100, dtype=torch.uint8)
        sent = pool.submit(send, ends[1], message)
        ends[0].start_recv(buffer).wait()
        sent.result(WAIT_S)
        assert torch.equal(buffer, message)
    for end in ends:
        end.close()


def test_a_killed_peer_is_an_error_long_before_the_timeout() -> None:
    server = StoreServer("127.0.0.1")
    command = [sys.executable, "-m", "tests.transfer.io_peer", "127.0.0.1", str(server.port), "e"]
    peer = subprocess.Popen(command)
    try:
        decode = connect(
            "gloo",
            server.store,
            "e",
            DECODE_RANK,
            host="127.0.0.1",
            device=CPU,
            connect_timeout_s=60.0,
            operation_timeout_s=30.0,
        )
        first = torch.zeros(1, dtype=torch.uint8)
        decode.start_recv(first).wait()
        assert first.item() == 1
        with ThreadPoolExecutor(1) as pool:
            receive = pool.submit(recv, decode, torch.zeros(8, dtype=torch.uint8))
            peer.kill()
            with pytest.raises(TransferError):
                receive.result(5.0)
        decode.close()
    finally:
        peer.kill()
        peer.wait()


# ---- bounded calls


def test_a_call_that_hangs_is_given_up() -> None:
    release = threading.Event()
    with pytest.raises(TransferError, match=r"joining: no result within 0\.1 s"):
        run_bounded(release.wait, 0.1, "joining")
    release.set()


def test_what_a_call_brings_after_it_was_given_up_is_discarded() -> None:
    release, discarded = threading.Event(), threading.Event()
    with pytest.raises(TransferError, match="no result"):
        run_bounded(lambda: release.wait(WAIT_S), 0.05, "joining", lambda _: discarded.set())
    assert not discarded.is_set()
    release.set()
    assert discarded.wait(WAIT_S)


def test_an_error_of_another_kind_is_told_as_it_is() -> None:
    def fail() -> None:
        raise ConfigError("transfer.backend", "is wrong")

    with pytest.raises(ConfigError, match="is wrong"):
        run_bounded(fail, 5.0, "counting")


def test_a_bounded_call_gives_its_result_or_its_error() -> None:
    assert run_bounded(lambda: 5, 5.0, "counting") == 5

    def fail() -> None:
        raise RuntimeError("broken\nat frame 1")

    with pytest.raises(TransferError, match=r"counting: broken$"):
        run_bounded(fail, 5.0, "counting")


# ---- the store


def test_a_dead_epoch_leaves_nothing_in_the_store() -> None:
    server = StoreServer("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        for epoch in ("worker/1", "worker/11"):
            other = pool.submit(join, server.take(), epoch, PREFILL_RANK)
            ends = [join(server.take(), epoch, DECODE_RANK), other.result(WAIT_S)]
            for end in ends:
                end.close()
    server.forget("worker/1")
    left = server.store.list_keys()
    assert left
    assert all(key.startswith("worker/11/") for key in left)
    server.forget("worker/11")
    assert server.store.num_keys() == 0
    server.close()


def test_a_handle_in_which_somebody_waits_is_nobody_elses() -> None:
    server = StoreServer("127.0.0.1")
    first, second = server.take(), server.take()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.get, "key")
        second.set("other", "1")
        assert second.get("other") == b"1"
        server.store.set("key", "2")
        assert waiting.result(WAIT_S) == b"2"
    server.give_back(first)
    assert server.take() is first
    server.close()
    with pytest.raises(TransferError, match="closed"):
        server.take()


@pytest.mark.parametrize(
    ("backend", "device", "chosen"), [("auto", "cuda", "nccl"), ("auto", "cpu", "gloo"), ("gloo", "cuda", "gloo")]
)
def test_the_backend_follows_the_device_unless_it_is_given(backend: str, device: str, chosen: str) -> None:
    assert resolve_backend(backend, torch.device(device)) == chosen


def test_nccl_without_a_gpu_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"transfer\.backend"):
        resolve_backend("nccl", CPU)
