"""Linear layers whose weight may hold several of a checkpoint's matrices, stacked by output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from baton.engine.layers.device import cuda_kernels


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [num_tokens, in_size], weight: [out_size, in_size]. Returns [num_tokens, out_size]."""
    if x.is_cuda:
        return cuda_kernels().linear(x, weight, bias)
    return functional.linear(x, weight, bias)


class FusedLinear:
    """y = x W^T + b for parts that share their input, for instance q, k and v: one product instead of three.

    `parts` maps a part's name to its number of outputs; the order of the outputs is the order of the parts.
    """

    def __init__(
        self, parts: Mapping[str, int], in_size: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        out_size = sum(parts.values())
        self.parts = dict(parts)
        self.weight = torch.empty(out_size, in_size, dtype=dtype, device=device)
        self.bias = torch.empty(out_size, dtype=dtype, device=device) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, in_size]. Returns [num_tokens, sum of the parts]."""
        return linear(x, self.weight, self.bias)

    def parts_of(self, x: torch.Tensor) -> torch.Tensor:
        """The same, or float32 [parts, num_tokens, sum of the parts] to be summed: for who adds it to something."""
        if x.is_cuda:
            return cuda_kernels().linear_parts(x, self.weight, self.bias)
        return self(x)

    def checkpoint_views(self, prefix: str) -> dict[str, torch.Tensor]:
        """Where each of the checkpoint's tensors goes, by its name there."""
        sizes = list(self.parts.values())
        views = {f"{prefix}{n}.weight": v for n, v in zip(self.parts, torch.split(self.weight, sizes), strict=True)}
        if self.bias is not None:
            views |= {f"{prefix}{n}.bias": v for n, v in zip(self.parts, torch.split(self.bias, sizes), strict=True)}
        return views
