"""The packer for CUDA: one kernel gathers or scatters a segment and hashes it on the way.

Only `kv_transfer.packing.make_packer` imports this module, so that machines without Triton need none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.engine.kernels import kv_pack
from kv_transfer.fingerprint import salt_tensor, unsigned
from kv_transfer.messages import Segment
from kv_transfer.packing import check_shapes


class TritonPacker:
    """Works on the current stream; reading the fingerprints back waits for it."""

    def pack(
        self, kv_cache: torch.Tensor, segment: Segment, block_ids: Sequence[int], out: torch.Tensor, salts: list[int]
    ) -> list[int]:
        check_shapes(kv_cache, segment, block_ids, out, salts)
        ids = torch.tensor(block_ids, dtype=torch.int64, device=kv_cache.device)
        keys = salt_tensor(salts, kv_cache.device)
        return _to_host(kv_pack.pack(kv_cache, segment.layer_start, segment.layer_end, ids, out, keys))

    def unpack(
        self,
        kv_cache: torch.Tensor,
        segment: Segment,
        block_ids: Sequence[int],
        data: torch.Tensor,
        salts: list[int],
        expected: Sequence[int],
    ) -> bool:
        check_shapes(kv_cache, segment, block_ids, data, salts)
        ids = torch.tensor(block_ids, dtype=torch.int64, device=kv_cache.device)
        keys = salt_tensor(salts, kv_cache.device)
        found = _to_host(kv_pack.unpack(kv_cache, segment.layer_start, segment.layer_end, ids, data, keys))
        return found == list(expected)


def _to_host(fingerprints: torch.Tensor) -> list[int]:
    return [unsigned(value) for value in fingerprints.tolist()]
