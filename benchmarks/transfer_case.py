"""What `benchmarks.transfer_smoke` moves: its options, and which blocks each chunk carries from where to where."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baton.engine.kv_layout import KVLayout
from kv_transfer.messages import Segment

NUM_BLOCKS = 64


@dataclass(frozen=True)
class Options:
    """One run. `chunk_bytes` is the size of a staging slot and of each message."""

    backend: str
    device: str
    chunks: int
    chunk_bytes: int
    window: int
    max_ctas: int
    operation_timeout_s: float
    shared_view: bool

    @property
    def layout(self) -> KVLayout:
        return KVLayout("smoke", "bfloat16", block_size=16, num_layers=8, num_kv_heads=8, head_dim=128)

    @property
    def blocks_per_chunk(self) -> int:
        return self.chunk_bytes // self.layout.block_bytes

    def device_of(self, rank: int) -> torch.device:
        """Where `rank` keeps its KV: its only GPU, unless both processes see all (`shared_view`)."""
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())

    def visible_device(self, rank: int, visible: str) -> str:
        """CUDA_VISIBLE_DEVICES for `rank`, given that of both; as Ray sets it for workers."""
        names = visible.split(",")
        return names[rank % len(names)]

    def segment(self, seq: int) -> Segment:
        start = seq * self.blocks_per_chunk % NUM_BLOCKS
        return Segment(0, self.layout.num_layers, start, start + self.blocks_per_chunk)

    def source_blocks(self, seq: int) -> list[int]:
        segment = self.segment(seq)
        return [block * 3 % NUM_BLOCKS for block in range(segment.block_start, segment.block_end)]

    def target_blocks(self, seq: int) -> list[int]:
        segment = self.segment(seq)
        return [(block * 5 + 1) % NUM_BLOCKS for block in range(segment.block_start, segment.block_end)]


def source_cache(options: Options, device: torch.device) -> torch.Tensor:
    """The prefill end's KV: the same values wherever it is made."""
    cache = options.layout.allocate(NUM_BLOCKS, torch.device("cpu"))
    bits = cache.view(torch.int16)
    bits.copy_(((torch.arange(bits.numel()) * 40503 + 17) & 0x3FFF).view(bits.shape))  # finite in bfloat16
    return cache.to(device)
