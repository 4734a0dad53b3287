"""The shape of a KV cache, and what two workers must agree on to exchange blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Layout of `kv_cache`: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], K at 0, V at 1.

    `model_hash` names the weights and every setting that changes the values of K and V.
    """

    model_hash: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def block_bytes_per_layer(self) -> int:
        """Bytes of one block's K and V in one layer."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.block_bytes_per_layer

    def segment_bytes(self, num_layers: int, num_blocks: int) -> int:
        return num_layers * num_blocks * self.block_bytes_per_layer

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int, device: torch.device) -> torch.Tensor:
        """A zeroed cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]."""
        shape = (self.num_layers, 2, num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        return torch.zeros(shape, dtype=self.torch_dtype, device=device)

    def differences(self, other: KVLayout) -> list[str]:
        """One sentence per field in which the two differ; empty when blocks can be exchanged."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name}: {mine} here, {theirs} there" for name, mine, theirs in pairs if mine != theirs]
