"""Tile sizes and launch settings per GPU generation, kept as data: nothing is tuned at run time.

`Tuning.of(device)` is made once per backend; the launchers take the small records it hands out.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """`block_m` rows (tokens times query heads of a group) by `block_n` positions per tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """`programs` bounds the splits per KV head (beyond one per sequence); a split has at least `min_tiles` tiles."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int
    min_tiles: int


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """When cuDNN's dense attention beats the paged kernel: it is `speedup` times faster on equal work, for segments of
    `min_tokens` to `max_tokens` tokens, padded to multiples of `step`.
    """

    min_tokens: int
    max_tokens: int
    step: int
    speedup: float


@dataclass(frozen=True, slots=True)
class ThinConfig:
    """`block_out` rows of a weight by `block_in` of its columns per load."""

    block_out: int
    block_in: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class FewConfig:
    """`block_out` rows of a weight by `block_in` of its columns per load, its columns cut into `splits`."""

    block_out: int
    block_in: int
    num_warps: int
    num_stages: int
    splits: int


# Head dimensions are padded to these; a table gives its rows in this order.
_HEAD_DIMS: Final = (64, 128, 256)

_HALF_PREFILL: Final = MappingProxyType(
    {
        8: (PrefillConfig(128, 64, 4, 3), PrefillConfig(128, 64, 8, 3), PrefillConfig(64, 32, 4, 2)),
        9: (PrefillConfig(128, 128, 8, 3), PrefillConfig(128, 64, 8, 3), PrefillConfig(128, 64, 8, 2)),
        10: (PrefillConfig(128, 128, 8, 3), PrefillConfig(128, 128, 8, 2), PrefillConfig(128, 64, 8, 2)),
    }
)
_FLOAT32_PREFILL: Final = (PrefillConfig(32, 32, 4, 2), PrefillConfig(32, 32, 4, 2), PrefillConfig(32, 16, 4, 2))

# block_n, num_warps, num_stages, programs per SM, min_tiles
_HALF_DECODE: Final = MappingProxyType(
    {
        8: ((64, 4, 3, 4, 2), (64, 4, 3, 3, 2), (32, 4, 3, 2, 2)),
        9: ((128, 4, 3, 4, 1), (64, 4, 4, 1, 1), (32, 4, 3, 4, 2)),
        10: ((128, 4, 3, 4, 1), (64, 4, 3, 4, 2), (32, 4, 3, 4, 2)),
    }
)
_FLOAT32_DECODE: Final = ((32, 4, 2, 4, 2), (32, 4, 2, 4, 2), (16, 4, 2, 4, 2))


# One row only: with more, cuBLAS is faster. Long rows of a weight are read in longer pieces.
_THIN: Final = MappingProxyType({9: (ThinConfig(16, 256, 4, 4), ThinConfig(8, 512, 4, 4))})
_THIN_GATED: Final = MappingProxyType({9: ThinConfig(8, 256, 4, 4)})
_LONG_ROW: Final = 8192

# Rows of x, padded, and what the weight is like, to how its product is computed where cuBLAS is slower.
_FEW: Final = MappingProxyType(
    {
        9: {
            (16, "gated"): FewConfig(64, 128, 4, 4, 1),
            (16, "short"): FewConfig(64, 256, 4, 3, 2),
            (16, "long"): FewConfig(128, 128, 8, 4, 4),
            (16, "wide"): FewConfig(64, 128, 4, 5, 1),
            (32, "gated"): FewConfig(64, 128, 4, 4, 1),
            (32, "short"): FewConfig(64, 128, 4, 4, 2),
            (32, "long"): FewConfig(128, 128, 8, 4, 4),
            (32, "wide"): FewConfig(64, 128, 4, 4, 1),
            (64, "gated"): FewConfig(64, 128, 4, 4, 1),
            (64, "short"): FewConfig(64, 128, 4, 4, 2),
            (64, "long"): FewConfig(64, 128, 4, 4, 2),
            (64, "wide"): FewConfig(64, 64, 4, 5, 1),
        }
    }
)

_DENSE: Final = MappingProxyType({9: DenseConfig(min_tokens=1024, max_tokens=8192, step=1024, speedup=1.27)})


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a device is: the generation whose rows are used, and its number of streaming multiprocessors."""

    generation: int
    num_sms: int

    @classmethod
    def of(cls, device: torch.device) -> Tuning:
        """An unknown newer generation uses the newest rows; the CPU (interpreter) counts as a tiny Hopper."""
        if device.type != "cuda":
            return cls(generation=9, num_sms=2)
        properties = torch.cuda.get_device_properties(device)
        return cls(generation=min(max(properties.major, 8), 10), num_sms=properties.multi_processor_count)

    def prefill(self, head_dim: int, dtype: torch.dtype) -> PrefillConfig:
        rows = _HALF_PREFILL[self.generation] if dtype.itemsize == 2 else _FLOAT32_PREFILL
        return rows[_row(head_dim)]

    def dense(self, head_dim: int, dtype: torch.dtype) -> DenseConfig | None:
        """None where it was not measured, or where cuDNN has no kernel."""
        return _DENSE.get(self.generation) if dtype.itemsize == 2 and head_dim in (64, 128) else None

    def thin(self, num_rows: int, in_size: int, dtype: torch.dtype) -> ThinConfig | None:
        """None where cuBLAS is faster, or nothing was measured."""
        configs = _THIN.get(self.generation)
        if configs is None or num_rows != 1 or dtype.itemsize != 2:
            return None
        return configs[in_size > _LONG_ROW]

    def thin_gated(self, num_rows: int, dtype: torch.dtype) -> ThinConfig | None:
        """The same for a gate-up product with its activation."""
        return _THIN_GATED.get(self.generation) if num_rows == 1 and dtype.itemsize == 2 else None

    def few(self, num_rows: int, weight: torch.Tensor, kind: str) -> FewConfig | None:
        """For a product of more than one row. `kind`: "plain"; "parts", which may be split; "gated". None: cuBLAS."""
        out_size, in_size = weight.shape
        if weight.itemsize != 2 or not 1 < num_rows <= 64:
            return None
        configs = _FEW.get(self.generation, {})
        rows = max(16, 1 << (num_rows - 1).bit_length())
        if kind == "parts":
            kind = "long" if in_size > _LONG_ROW else "short"
        elif kind == "plain" and out_size > 32768:
            kind = "wide"
        config = configs.get((rows, kind))
        return config if config is not None and in_size % (config.splits * config.block_in) == 0 else None

    def decode(self, head_dim: int, num_kv_heads: int, dtype: torch.dtype) -> DecodeConfig:
        rows = _HALF_DECODE[self.generation] if dtype.itemsize == 2 else _FLOAT32_DECODE
        block_n, num_warps, num_stages, per_sm, min_tiles = rows[_row(head_dim)]
        programs = max(1, self.num_sms * per_sm // num_kv_heads)
        return DecodeConfig(block_n, num_warps, num_stages, programs, min_tiles)


def _row(head_dim: int) -> int:
    for i, size in enumerate(_HEAD_DIMS):
        if head_dim <= size:
            return i
    raise ValueError(f"head_dim {head_dim} is larger than {_HEAD_DIMS[-1]}")
