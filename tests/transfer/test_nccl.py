"""How an NCCL connection watches its operations, with stand-ins for the process group and for CUDA events."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from baton.common.errors import ConfigError
from kv_transfer.connection import DECODE_RANK, PREFILL_RANK, connect, nccl_environment
from kv_transfer.nccl import NcclTransport
from kv_transfer.transport import TransferError
from tests.transfer.io_support import WAIT_S, recv

BUFFER = torch.zeros(4, dtype=torch.uint8)


class FakeEvent:
    """Fires when the test lets it."""

    def __init__(self, fired: threading.Event) -> None:
        self._fired = fired

    def record(self) -> None: ...

    def query(self) -> bool:
        return self._fired.is_set()

    def synchronize(self) -> None:
        assert self._fired.wait(WAIT_S)


class FakeGroup:
    """Operations complete when `done` is set; `abort` ends those in flight unless it is broken."""

    def __init__(self, done: threading.Event, abort_works: bool = True) -> None:
        self.done = done
        self.abort_works = abort_works
        self.aborts = 0
        self.launched = threading.Event()
        self.messages: list[bytes] = []

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> SimpleNamespace:
        self.messages += [bytes(tensor.tolist()) for tensor in tensors]
        self.launched.set()
        return SimpleNamespace(wait=lambda: True)

    recv = send

    def abort(self) -> None:
        self.aborts += 1
        if self.abort_works:
            self.done.set()


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    fired = threading.Event()
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: FakeEvent(fired))
    monkeypatch.setattr("kv_transfer.nccl._ABORT_TIMEOUT_S", 0.3)
    return fired


def nccl_over(group: FakeGroup, timeout_s: float = 30.0) -> NcclTransport:
    return NcclTransport(group, 1, timeout_s, threading.Lock())  # type: ignore[arg-type]


def test_nccl_operation_past_its_deadline_aborts_the_communicator(done: threading.Event) -> None:
    group = FakeGroup(done)
    transport = nccl_over(group, timeout_s=0.1)
    with pytest.raises(TransferError, match=r"recv of 4 bytes: not complete within 0\.1 s"):
        transport.start_recv(BUFFER).wait()
    assert group.aborts == 1
    with pytest.raises(TransferError, match="closed"):
        transport.start_send(BUFFER).wait()
    transport.close()
    assert group.aborts == 1


def test_nccl_close_frees_an_operation_in_flight(done: threading.Event) -> None:
    group = FakeGroup(done)
    transport = nccl_over(group)
    with ThreadPoolExecutor(1) as pool:
        receive = pool.submit(recv, transport, BUFFER)
        assert group.launched.wait(WAIT_S)
        transport.close()
        with pytest.raises(TransferError):
            receive.result(WAIT_S)
    assert group.aborts == 1


def test_nccl_operation_completes_without_an_abort(done: threading.Event) -> None:
    group = FakeGroup(done)
    done.set()
    nccl_over(group).start_send(BUFFER).wait()
    assert group.aborts == 0


def test_nccl_close_says_when_the_gpu_may_still_touch_memory(done: threading.Event) -> None:
    transport = nccl_over(FakeGroup(done, abort_works=False), timeout_s=0.1)
    with ThreadPoolExecutor(1) as pool:
        receive = pool.submit(recv, transport, BUFFER)
        with pytest.raises(TransferError, match="still in an aborted operation"):
            transport.close()
        done.set()
        transport.close()
        with pytest.raises(TransferError):
            receive.result(WAIT_S)


def test_nccl_operations_overlap_and_each_is_waited_for(done: threading.Event) -> None:
    transport = nccl_over(FakeGroup(done))
    transfers = [transport.start_send(BUFFER) for _ in range(3)]
    done.set()
    for transfer in transfers:
        transfer.wait()
    transport.close()


def test_nccl_cuts_a_large_buffer_into_messages(done: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.nccl.MESSAGE_BYTES", 4)
    group = FakeGroup(done)
    done.set()
    nccl_over(group).start_send(torch.arange(10, dtype=torch.uint8)).wait()
    assert group.messages == [bytes([0, 1, 2, 3]), bytes([4, 5, 6, 7]), bytes([8, 9])]


def test_workers_turn_multicast_and_torchs_own_error_handling_off() -> None:
    environment = nccl_environment()
    assert environment["NCCL_NVLS_ENABLE"] == environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert environment["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == environment["NCCL_LAUNCH_ORDER_IMPLICIT"] == "1"


@pytest.mark.parametrize("missing", ["NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"])
def test_nccl_is_not_touched_where_multicast_is_not_off(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in nccl_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    store = HashStore()
    store.set(f"e/here/{PREFILL_RANK}", "1")
    with pytest.raises(ConfigError, match=missing):
        connect(
            "nccl",
            store,
            "e",
            DECODE_RANK,
            host="127.0.0.1",
            device=torch.device("cuda", 0),
            connect_timeout_s=1.0,
            operation_timeout_s=1.0,
        )
