"""What the layers compute through Triton kernels. Imported by name, on a GPU only."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from baton.engine.kernels import rms_norm as kernel
from baton.engine.kernels.few_linear import MAX_ROWS, few_gated_linear, few_linear
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
    return _product(x, weight, bias, "plain")


def linear_parts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """May return float32 [parts, num_rows, out_size]."""
    return _product(x, weight, bias, "parts")


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None or x.shape[0] > MAX_ROWS:
        return silu_mul(linear(x, weight, bias))
    tuning = _tuning(x.device)
    if (thin := tuning.thin_gated(x.shape[0], x.dtype)) is not None:
        return thin_gated_linear(x, weight, thin)
    if (few := tuning.few(x.shape[0], weight, "gated")) is not None:
        return few_gated_linear(x, weight, few)
    return silu_mul(linear(x, weight, None))


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    if x.shape[0] > MAX_ROWS:
        return functional.linear(x, weight, bias)
    tuning = _tuning(x.device)
    if (thin := tuning.thin(x.shape[0], x.shape[1], x.dtype)) is not None:
        return thin_linear(x, weight, bias, thin)
    if (few := tuning.few(x.shape[0], weight, kind)) is not None:
        return few_linear(x, weight, bias, few)
    return functional.linear(x, weight, bias)


@cache
def _tuning(device: torch.device) -> Tuning:
    return Tuning.of(device)
