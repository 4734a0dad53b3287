"""The staging slots of one end of a connection: the only memory that a peer can write to.

Slot numbers are handed out by the protocol; the pool owns the memory and counts the slots that a transfer job is
using. `slot` is called on transfer threads, `in_use` on any.
"""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import torch

from baton.common.errors import ConfigError
from baton.engine.kv_layout import KVLayout

_ALIGNMENT = 256


class StagingPool:
    """`num_slots` uint8 buffers of `slot_bytes` each, allocated once."""

    def __init__(self, layout: KVLayout, num_slots: int, slot_bytes: int, device: torch.device) -> None:
        if slot_bytes < layout.block_bytes_per_layer:
            needed = layout.block_bytes_per_layer
            raise ConfigError("transfer.slot_bytes", f"{slot_bytes} is less than one block of a layer, {needed} bytes")
        self.layout = layout
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.device = device
        stride = -(-slot_bytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = _zeros(num_slots, stride, device)
        self._holders: Counter[int] = Counter()
        self._lock = threading.Lock()

    def slot(self, index: int) -> torch.Tensor:
        """The whole slot: uint8 [slot_bytes]."""
        if not 0 <= index < self.num_slots:
            raise IndexError(f"staging slot {index} of {self.num_slots}")
        return self._memory[index, : self.slot_bytes]

    @property
    def in_use(self) -> int:
        """Slots named by a job that is queued or running."""
        with self._lock:
            return len(self._holders)

    def hold(self, index: int) -> None:
        """A job names the slot from now on."""
        with self._lock:
            self._holders[index] += 1

    def release(self, index: int) -> None:
        """That job has ended."""
        with self._lock:
            self._holders[index] -= 1
            if not self._holders[index]:
                del self._holders[index]


def _zeros(num_slots: int, stride: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_slots, stride]; on the CPU pages that are not used yet take no memory."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros((num_slots, stride), dtype=np.uint8))
    return torch.zeros(num_slots, stride, dtype=torch.uint8, device=device)
