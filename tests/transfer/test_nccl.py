"""How an NCCL connection watches its operations, with stand-ins for the process group and for CUDA events."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from baton.common.errors import ConfigError
from kv_transfer import streams
from kv_transfer.connection import DECODE_RANK, PREFILL_RANK, connect, nccl_environment
from kv_transfer.nccl import NcclTransport, connect_nccl
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

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> SimpleNamespace:
        return self.send(tensors, peer, tag)

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


def test_others_may_launch_between_the_messages_of_a_large_buffer(
    done: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_transfer.nccl.MESSAGE_BYTES", 4)
    holds: list[str] = []

    class Lock:
        def __enter__(self) -> None:
            holds.append("")

        def __exit__(self, *_: object) -> None: ...

    done.set()
    NcclTransport(FakeGroup(done), 1, 30.0, Lock()).start_send(torch.zeros(10, dtype=torch.uint8)).wait()  # type: ignore[arg-type]
    assert len(holds) == 3


class FailsAtSecond(FakeGroup):
    def send(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> SimpleNamespace:
        if self.messages:
            raise RuntimeError("the second message")
        return super().send(tensors, peer, tag)


def test_nccl_close_waits_for_the_messages_before_the_one_that_failed(
    done: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_transfer.nccl.MESSAGE_BYTES", 4)
    transport = nccl_over(FailsAtSecond(done, abort_works=False))
    with pytest.raises(TransferError, match="the second message"):
        transport.start_send(torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(TransferError, match="still in an aborted operation"):
        transport.close()
    done.set()
    transport.close()


class FakeNccl:
    """CUDA and NCCL as far as a join needs them; `current` is the stream that is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, group: FakeGroup) -> None:
        self.current: object = None
        self.may_come = threading.Event()
        self.may_come.set()
        self._group = group
        monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", self, raising=False)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: object())
        monkeypatch.setattr(streams, "_idle", defaultdict(list))
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: BUFFER[:1])

    def __call__(self, *_: object) -> FakeGroup:
        assert self.may_come.wait(WAIT_S)
        return self._group

    def Options(self) -> SimpleNamespace:  # noqa: N802
        self.options = SimpleNamespace(config=SimpleNamespace())
        return self.options

    @contextmanager
    def _stream(self, stream: object) -> Iterator[None]:
        self.current = stream
        yield
        self.current = None

    def join(self, timeout_s: float = WAIT_S) -> NcclTransport:
        device = torch.device("cuda", 0)
        return connect_nccl(HashStore(), 0, device, timeout_s, 30.0, threading.Lock(), 4)


def num_watchdogs() -> int:
    """Of this process, when those that were told to end have."""
    watchdogs = [thread for thread in threading.enumerate() if thread.name == "NCCL watchdog"]
    for watchdog in watchdogs:
        watchdog.join(0.1)
    return sum(watchdog.is_alive() for watchdog in watchdogs)


def test_the_first_byte_does_not_go_by_the_models_stream(
    done: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[object] = []

    class Group(FakeGroup):
        def recv(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> SimpleNamespace:
            streams.append(nccl.current)
            return self.send(tensors, peer, tag)

    nccl = FakeNccl(monkeypatch, Group(done))
    done.set()
    nccl.join().close()
    assert streams != [None]
    assert len(streams) == 1
    assert nccl.options.is_high_priority_stream, "what arrives would wait for the unpack of what came before"


def test_a_join_whose_first_byte_fails_leaves_nothing_behind(
    done: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Group(FakeGroup):
        def recv(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> SimpleNamespace:
            raise RuntimeError("no byte")

    before = num_watchdogs()
    group = Group(done)
    done.set()
    with pytest.raises(TransferError, match="no byte"):
        FakeNccl(monkeypatch, group).join()
    assert group.aborts == 1
    assert num_watchdogs() == before


def test_a_join_that_comes_too_late_is_closed(done: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    class Group(FakeGroup):
        def abort(self) -> None:
            super().abort()
            aborted.set()

    aborted = threading.Event()
    nccl = FakeNccl(monkeypatch, Group(done))
    nccl.may_come.clear()
    done.set()
    with pytest.raises(TransferError, match="NCCL connect: no result"):
        nccl.join(timeout_s=0.05)
    assert not aborted.is_set()
    nccl.may_come.set()
    assert aborted.wait(WAIT_S)


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
