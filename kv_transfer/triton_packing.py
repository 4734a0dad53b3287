"""The packer for CUDA: one kernel gathers or scatters a segment and hashes it on the way.

Only `kv_transfer.packing.make_packer` imports this module, so that machines without Triton need none.

What a chunk costs its threads here is what bounds a fast link, so nothing is allocated per chunk: its block ids and
salts go to the device in one copy out of pinned memory that is kept, the kernel that finishes the fingerprints writes
them to such memory itself, and both kernels are launched as compiled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch

from baton.engine.kernels import kv_pack
from baton.engine.kernels.kv_pack import PackTables
from baton.engine.kernels.launch import next_power_of_2
from kv_transfer.fingerprint import Salts, block_salts
from kv_transfer.messages import LeaseKey, Segment
from kv_transfer.packing import Copy, are_expected, checked_ids
from kv_transfer.streams import borrowed

_PREPARED = 16  # chunks under way at once before more memory is pinned, which may wait for the device
_MIN_BLOCKS = 1024


class TritonPacker:
    """Launches on the current stream; see `Packer`. Any thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle = deque(_Scratch(_MIN_BLOCKS, device) for _ in range(_PREPARED))

    def start_pack(
        self, kv_cache: torch.Tensor, segment: Segment, block_ids: Sequence[int], out: torch.Tensor, salts: Salts
    ) -> Copy[list[int]]:
        scratch = self._filled(checked_ids(kv_cache, segment, block_ids, out, salts), salts)
        kv_pack.pack(kv_cache, segment.layer_start, segment.layer_end, len(salts), scratch.tables, out)
        return scratch.launched(len(salts), self._idle)

    def start_unpack(
        self,
        kv_cache: torch.Tensor,
        segment: Segment,
        block_ids: Sequence[int],
        data: torch.Tensor,
        salts: Salts,
        expected: Sequence[int],
    ) -> Copy[bool]:
        scratch = self._filled(checked_ids(kv_cache, segment, block_ids, data, salts), salts)
        kv_pack.unpack(kv_cache, segment.layer_start, segment.layer_end, len(salts), scratch.tables, data)
        return _Comparison(scratch.launched(len(salts), self._idle), expected)

    def _filled(self, block_ids: npt.NDArray[np.int64], salts: Salts) -> _Scratch:
        """Scratch that nobody else uses, with the chunk's tables on their way to the device."""
        try:
            scratch = self._idle.pop()
        except IndexError:
            scratch = _Scratch(_MIN_BLOCKS, self._device)
        if len(salts) > scratch.num_blocks:
            scratch = _Scratch(next_power_of_2(len(salts)), self._device)
        scratch.fill(block_ids, salts)
        return scratch


def warm_up(kv_cache: torch.Tensor) -> None:
    """Launch pack and unpack once, on a stream of their own, and wait for them. The cache is left as it is."""
    segment = Segment(0, 1, 0, 1)
    salts = block_salts(LeaseKey(0, 0), 0, segment)
    device, packer = kv_cache.device, TritonPacker(kv_cache.device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # whoever fills the cache may still be at it, on another stream
    with borrowed(device) if device.type == "cuda" else nullcontext():
        data = torch.empty(kv_cache[0, :, 0].nbytes, dtype=torch.uint8, device=device)
        fingerprints = packer.start_pack(kv_cache, segment, [0], data, salts).wait()
        if not packer.start_unpack(kv_cache, segment, [0], data, salts, fingerprints).wait():
            raise RuntimeError(f"{device}: what the pack kernel wrote the unpack kernel does not verify")


class _Scratch:
    """The tables of one chunk at a time, of at most `num_blocks` blocks, on the device and in memory of the host."""

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"  # else under Triton's interpreter
        self.num_blocks = num_blocks
        self._host = torch.empty(2, num_blocks, dtype=torch.int64, pin_memory=is_cuda)
        self._rows = self._host.numpy()
        self._on_device = torch.empty(2, num_blocks, dtype=torch.int64, device=device)
        fingerprints = torch.empty(num_blocks, dtype=torch.int64, pin_memory=is_cuda)
        self._found = fingerprints.numpy().view(np.uint64)
        sums = torch.zeros(num_blocks, dtype=torch.int64, device=device)
        self.tables = PackTables(self._on_device[0], self._on_device[1], sums, fingerprints)
        self._done: torch.cuda.Event | None = None
        if is_cuda:
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            torch.cuda.current_stream(device).synchronize()  # the zeros are there for all streams

    def fill(self, block_ids: npt.NDArray[np.int64], salts: Salts) -> None:
        self._rows[0, : len(salts)] = block_ids
        self._rows[1, : len(salts)] = salts.view(np.int64)
        self._on_device.copy_(self._host, non_blocking=True)

    def launched(self, num_blocks: int, idle: deque[_Scratch]) -> Copy[list[int]]:
        """The chunk's fingerprints behind the work on the current stream; then the scratch is `idle` again."""
        if self._done is not None:
            self._done.record()
        return _Fingerprints(self, num_blocks, idle)

    def fingerprints(self, num_blocks: int) -> list[int]:
        if self._done is not None:
            self._done.synchronize()
        values: list[int] = self._found[:num_blocks].tolist()
        return values


class _Fingerprints:
    """As the unsigned integers that they are. After a failed launch or wait its scratch is not used again."""

    def __init__(self, scratch: _Scratch, num_blocks: int, idle: deque[_Scratch]) -> None:
        self._scratch = scratch
        self._num_blocks = num_blocks
        self._idle = idle

    def wait(self) -> list[int]:
        values = self._scratch.fingerprints(self._num_blocks)
        self._idle.append(self._scratch)
        return values


class _Comparison:
    def __init__(self, found: Copy[list[int]], expected: Sequence[int]) -> None:
        self._found = found
        self._expected = list(expected)

    def wait(self) -> bool:
        return are_expected(self._found.wait(), self._expected)
