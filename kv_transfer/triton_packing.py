"""The packer for CUDA: one kernel gathers or scatters a segment and hashes it on the way.

Only `kv_transfer.packing.make_packer` imports this module, so that machines without Triton need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch

from baton.engine.kernels import kv_pack
from kv_transfer.fingerprint import Salts, block_salts
from kv_transfer.messages import LeaseKey, Segment
from kv_transfer.packing import Copy, Done, are_expected, checked_ids
from kv_transfer.streams import borrowed


class TritonPacker:
    """Launches on the current stream; see `Packer`."""

    def start_pack(
        self, kv_cache: torch.Tensor, segment: Segment, block_ids: Sequence[int], out: torch.Tensor, salts: Salts
    ) -> Copy[list[int]]:
        ids, keys = upload(checked_ids(kv_cache, segment, block_ids, out, salts), salts, kv_cache.device)
        return _fetch(kv_pack.pack(kv_cache, segment.layer_start, segment.layer_end, ids, out, keys))

    def start_unpack(
        self,
        kv_cache: torch.Tensor,
        segment: Segment,
        block_ids: Sequence[int],
        data: torch.Tensor,
        salts: Salts,
        expected: Sequence[int],
    ) -> Copy[bool]:
        ids, keys = upload(checked_ids(kv_cache, segment, block_ids, data, salts), salts, kv_cache.device)
        found = kv_pack.unpack(kv_cache, segment.layer_start, segment.layer_end, ids, data, keys)
        return _Comparison(_fetch(found), expected)


def _fetch(on_device: torch.Tensor) -> Copy[list[int]]:
    """Fingerprints, int64 [num_blocks], as the unsigned integers that they are."""
    if on_device.device.type == "cuda":
        return _Fingerprints(on_device)
    return Done(on_device.numpy().view(np.uint64).tolist())  # under Triton's interpreter


def warm_up(kv_cache: torch.Tensor) -> None:
    """Launch pack and unpack once, on a stream of their own, and wait for them. The cache is left as it is."""
    segment = Segment(0, 1, 0, 1)
    salts = block_salts(LeaseKey(0, 0), 0, segment)
    device, packer = kv_cache.device, TritonPacker()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # whoever fills the cache may still be at it, on another stream
    with borrowed(device) if device.type == "cuda" else nullcontext():
        data = torch.empty(kv_cache[0, :, 0].nbytes, dtype=torch.uint8, device=device)
        fingerprints = packer.start_pack(kv_cache, segment, [0], data, salts).wait()
        if not packer.start_unpack(kv_cache, segment, [0], data, salts, fingerprints).wait():
            raise RuntimeError(f"{device}: what the pack kernel wrote the unpack kernel does not verify")


def upload(block_ids: npt.NDArray[np.int64], salts: Salts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as int64 on the device, in one copy out of pinned memory: nothing waits for the stream.

    Both begin at a multiple of 16 bytes, whatever their length: kernels are compiled anew for what does not.
    """
    num_blocks = len(salts)
    values = np.empty((2, num_blocks + num_blocks % 2), dtype=np.int64)
    values[0, :num_blocks], values[1, :num_blocks] = block_ids, salts.view(np.int64)
    host = torch.from_numpy(values)
    ids, keys = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    return ids[:num_blocks], keys[:num_blocks]


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
