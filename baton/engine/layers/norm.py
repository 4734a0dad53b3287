"""RMS normalisation, computed in float32 whatever the model's type."""

from __future__ import annotations

import torch

from baton.engine.layers.device import cuda_kernels


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [..., size], weight: [size]. Returns x's shape and dtype."""
    if x.is_cuda and x.dim() == 2:
        return cuda_kernels().rms_norm(x, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to the residual stream and normalise the sum. Returns (normalised, new residual).

    x: [num_tokens, size], or what `FusedLinear.parts_of` gives.

    The residual that was passed in must not be used again: it may hold the new one.
    """
    if x.is_cuda:
        return cuda_kernels().add_rms_norm(x, residual, weight, eps)
    residual = residual + x
    return rms_norm(residual, weight, eps), residual
