"""The staging slots of one end of a connection: the only memory that a peer can write to.

Slot numbers are handed out by the protocol; the pool owns the memory and knows which slots a transfer job is using, and
of which epoch: no two epochs may touch one slot (invariant I1). `allocate` and `slot` are called on threads that may
block, the rest on any.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from baton.common.errors import ConfigError
from baton.engine.kv_layout import KVLayout
from kv_transfer import streams
from kv_transfer.transport import TransferError

logger = logging.getLogger(__name__)
_ALIGNMENT = 256


@dataclass(slots=True)
class _Holder:
    """The epoch whose jobs use a slot, and how many do."""

    epoch: str
    num_jobs: int = 0


class StagingPool:
    """`num_slots` uint8 buffers of `slot_bytes` each, allocated once: by `allocate`, or when one is first used."""

    def __init__(self, layout: KVLayout, num_slots: int, slot_bytes: int, device: torch.device) -> None:
        if slot_bytes < layout.block_bytes_per_layer:
            needed = layout.block_bytes_per_layer
            raise ConfigError("transfer.slot_bytes", f"{slot_bytes} is less than one block of a layer, {needed} bytes")
        self.layout = layout
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.device = device
        self._memory: torch.Tensor | None = None
        self._allocating = threading.Lock()  # not `_lock`, for which the asyncio thread waits
        self._holders: dict[int, _Holder] = {}
        self._lock = threading.Lock()

    def allocate(self) -> torch.Tensor:
        """All slots: uint8 [num_slots, slot_bytes rounded up]. Raises TransferError when the memory is not there."""
        with self._allocating:
            if self._memory is None:
                self._memory = self._allocated()
            return self._memory

    def _allocated(self) -> torch.Tensor:
        try:
            return _zeros(self.num_slots, -(-self.slot_bytes // _ALIGNMENT) * _ALIGNMENT, self.device)
        except torch.OutOfMemoryError as error:
            reason = (
                f"{self.device} has no memory for {self.num_slots} staging slots of {self.slot_bytes} bytes: raise "
                "transfer.num_pairs, for which memory is set aside, or lower transfer.window or transfer.slot_bytes"
            )
            logger.error("%s: %s", reason, error)
            raise TransferError(reason) from None

    def slot(self, index: int) -> torch.Tensor:
        """The whole slot: uint8 [slot_bytes]."""
        if not 0 <= index < self.num_slots:
            raise IndexError(f"staging slot {index} of {self.num_slots}")
        return self.allocate()[index, : self.slot_bytes]

    @property
    def in_use(self) -> int:
        """Slots named by a job that is queued or running."""
        with self._lock:
            return len(self._holders)

    def hold(self, index: int, epoch: str) -> bool:
        """A job of `epoch` names the slot from now on. False, and it must not, while one of another epoch does."""
        with self._lock:
            holder = self._holders.setdefault(index, _Holder(epoch))
            if holder.epoch != epoch:
                return False
            holder.num_jobs += 1
            return True

    def release(self, index: int) -> None:
        """That job has ended."""
        with self._lock:
            self._holders[index].num_jobs -= 1
            if not self._holders[index].num_jobs:
                del self._holders[index]


def _zeros(num_slots: int, stride: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_slots, stride]; on the CPU pages that are not used yet take no memory."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros((num_slots, stride), dtype=np.uint8))
    stream = _side_stream(device)
    with torch.cuda.stream(stream):
        zeros = torch.zeros(num_slots, stride, dtype=torch.uint8, device=device)
    stream.synchronize()  # lanes use it on streams of their own
    return zeros


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """For all staging of a device: memory that was freed is found again by the stream that it was allocated on.

    Not the default stream, on which the model runs: to wait for that is to wait for a whole prefill.
    """
    return streams.take(device)
