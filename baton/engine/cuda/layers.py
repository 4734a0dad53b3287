"""The layers' elementwise work through Triton kernels. Imported by name, on a GPU only."""

from __future__ import annotations

import torch
from torch.nn import functional

from baton.engine.kernels import rms_norm as kernel
from baton.engine.kernels.silu_mul import silu_mul


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return kernel.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual` is overwritten with the sum."""
    return kernel.rms_norm(x, weight, eps, residual), residual


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    return silu_mul(gate_up)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x, weight, bias)
