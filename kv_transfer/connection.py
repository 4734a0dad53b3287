"""Making the KV connection of a pair: rendezvous of the two ends under one epoch, then gloo or NCCL.

The coordinators call `connect` for every epoch, on a thread that may block, with rank 0 on decode and 1 on prefill.
There is no default process group and no world: each pair has a group of its own under its epoch's keys.
"""

from __future__ import annotations

import os
import threading
import time

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from baton.common.errors import ConfigError
from kv_transfer.gloo import GlooTransport, connect_gloo
from kv_transfer.nccl import NcclTransport, connect_nccl
from kv_transfer.transport import PairTransport, TransferError, first_line

__all__ = [
    "DECODE_RANK",
    "PREFILL_RANK",
    "GlooTransport",
    "NcclTransport",
    "PairTransport",
    "TransferError",
    "connect",
    "nccl_environment",
    "resolve_backend",
]

DECODE_RANK, PREFILL_RANK = 0, 1
MAX_CTAS = 4
_ARRIVAL_POLL_S = 0.003
_BUFFER_BYTES = 2 * 1024 * 1024
_MULTICAST_OFF = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")


def nccl_environment() -> dict[str, str]:
    """Variables that every worker process with a GPU sets before it imports torch.

    Off: NVLink multicast, and torch's handling of NCCL errors, which ends the process; connections watch their own
    operations. Launches of several communicators on one device keep the host's order; where a connection's first
    operation overlaps another's launch there is no order to keep and none is needed, so that is not an error.
    Off as well: torch's record of the latest operations, for each of which it takes the interpreter's lock once more.
    Buffers half as large as NCCL's own take less memory and, between GPUs of one host, carry more
    (docs/transfer_performance.md); what the operator has set for them stays.
    """
    return {
        "NCCL_BUFFSIZE": os.environ.get("NCCL_BUFFSIZE", str(_BUFFER_BYTES)),
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "NVSHMEM_DISABLE_NVLS": "1",
        "NCCL_LAUNCH_ORDER_IMPLICIT": "1",
        "NCCL_LAUNCH_RACE_FATAL": "0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_FR_BUFFER_SIZE": "0",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",  # the same, as older versions call it
    }


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "auto" is NCCL on a GPU and gloo elsewhere. Raises ConfigError for NCCL without a GPU."""
    if backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError("transfer.backend", f"NCCL needs a GPU, and this worker is on {device.type}: use gloo")
    return backend


def connect(
    backend: str,
    store: Store,
    epoch: str,
    rank: int,
    *,
    host: str,
    device: torch.device,
    connect_timeout_s: float,
    operation_timeout_s: float,
    launch_lock: threading.Lock | None = None,
    cancel: threading.Event | None = None,
    max_ctas: int = MAX_CTAS,
) -> PairTransport:
    """Join the pair's group of `epoch`, a name that this store has never seen. Blocks up to about twice the timeout.

    `host`: the address that gloo listens on. `launch_lock`: one per device and process, shared by its NCCL connections.
    `cancel`: set from any thread, ends the wait for the peer. Raises TransferError, or ConfigError for a wrong backend.
    """
    if backend not in ("gloo", "nccl"):
        raise ConfigError("transfer.backend", f"{backend!r} is neither gloo nor nccl")
    keys = PrefixStore(epoch, store)
    try:
        _await_peer(keys, rank, epoch, connect_timeout_s, cancel or threading.Event())
        if backend == "gloo":
            return connect_gloo(keys, rank, host, connect_timeout_s, operation_timeout_s)
        _check_environment()
        lock = launch_lock or threading.Lock()
        return connect_nccl(keys, rank, device, connect_timeout_s, operation_timeout_s, lock, max_ctas)
    except RuntimeError as error:
        raise TransferError(f"{backend} connect under epoch {epoch}: {first_line(error)}") from None


def _check_environment() -> None:
    """Raise ConfigError where NCCL would turn NVLink multicast on: that can put a host out of service."""
    wrong = [name for name in _MULTICAST_OFF if os.environ.get(name) != nccl_environment()[name]]
    if wrong:
        message = f"NCCL must not use NVLink multicast: {', '.join(wrong)} of this process are not as they must be"
        raise ConfigError("transfer.backend", message)


def _await_peer(keys: Store, rank: int, epoch: str, timeout_s: float, cancel: threading.Event) -> None:
    """Return once both ends are here.

    A store handle serves one call at a time and is shared by all connections of a worker, so a wait inside it for a
    peer that died would hold up the others; NCCL's own wait has no timeout at all. Hence this poll.
    """
    keys.set(f"here/{rank}", "1")
    deadline = time.monotonic() + timeout_s
    while not keys.check([f"here/{1 - rank}"]):
        if cancel.wait(_ARRIVAL_POLL_S):
            raise TransferError(f"connect under epoch {epoch}: cancelled")
        if time.monotonic() > deadline:
            raise TransferError(f"connect under epoch {epoch}: the peer did not come within {timeout_s} s")
