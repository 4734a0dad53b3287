"""What the layers compute through Triton kernels. Imported by name, on a GPU only."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from baton.engine.kernels import rms_norm as kernel
from baton.engine.kernels.silu_mul import silu_mul
from baton.engine.kernels.thin_linear import thin_gated_linear, thin_linear
from baton.engine.kernels.tuning import Tuning


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return kernel.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual` is overwritten with the sum."""
    return kernel.rms_norm(x, weight, eps, residual), residual


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    config = _tuning(x.device).thin(x.shape[0], x.shape[1], x.dtype)
    return functional.linear(x, weight, bias) if config is None else thin_linear(x, weight, bias, config)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    config = _tuning(x.device).thin_gated(x.shape[0], x.dtype) if bias is None else None
    return silu_mul(linear(x, weight, bias)) if config is None else thin_gated_linear(x, weight, config)


@cache
def _tuning(device: torch.device) -> Tuning:
    return Tuning.of(device)
