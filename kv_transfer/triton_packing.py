"""The packer for CUDA: one kernel gathers or scatters a segment and hashes it on the way.

Only `kv_transfer.packing.make_packer` imports this module, so that machines without Triton need none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from baton.engine.kernels import kv_pack
from kv_transfer.messages import Segment
from kv_transfer.packing import Copy, Done, are_expected, check_shapes


class TritonPacker:
    """Launches on the current stream; see `Packer`."""

    def start_pack(
        self, kv_cache: torch.Tensor, segment: Segment, block_ids: Sequence[int], out: torch.Tensor, salts: list[int]
    ) -> Copy[list[int]]:
        check_shapes(kv_cache, segment, block_ids, out, salts)
        ids, keys = _upload(block_ids, salts, kv_cache.device)
        return _fetch(kv_pack.pack(kv_cache, segment.layer_start, segment.layer_end, ids, out, keys))

    def start_unpack(
        self,
        kv_cache: torch.Tensor,
        segment: Segment,
        block_ids: Sequence[int],
        data: torch.Tensor,
        salts: list[int],
        expected: Sequence[int],
    ) -> Copy[bool]:
        check_shapes(kv_cache, segment, block_ids, data, salts)
        ids, keys = _upload(block_ids, salts, kv_cache.device)
        found = kv_pack.unpack(kv_cache, segment.layer_start, segment.layer_end, ids, data, keys)
        return _Comparison(_fetch(found), expected)


def _fetch(on_device: torch.Tensor) -> Copy[list[int]]:
    """Fingerprints, int64 [num_blocks], as the unsigned integers that they are."""
    if on_device.device.type == "cuda":
        return _Fingerprints(on_device)
    return Done(on_device.numpy().view(np.uint64).tolist())  # under Triton's interpreter


def _upload(block_ids: Sequence[int], salts: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as int64 on the device, in one copy out of pinned memory: nothing waits for the stream."""
    values = np.empty((2, len(salts)), dtype=np.uint64)
    values[0], values[1] = block_ids, salts
    host = torch.from_numpy(values.view(np.int64))
    ids, keys = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    return ids, keys


class _Fingerprints:
    """Fetches int64 [num_blocks] from the device behind the work on the current stream."""

    def __init__(self, on_device: torch.Tensor) -> None:
        self._host = torch.empty(on_device.shape, dtype=torch.int64, pin_memory=True)
        self._host.copy_(on_device, non_blocking=True)
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._done.record()

    def wait(self) -> list[int]:
        self._done.synchronize()
        values: list[int] = self._host.numpy().view(np.uint64).tolist()
        return values


class _Comparison:
    def __init__(self, found: Copy[list[int]], expected: Sequence[int]) -> None:
        self._found = found
        self._expected = list(expected)

    def wait(self) -> bool:
        return are_expected(self._found.wait(), self._expected)
