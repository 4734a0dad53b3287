"""Where the layers find the kernels for tensors on a GPU. On a CPU they compute in plain torch."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol, cast

import torch


class LayerKernels(Protocol):
    """Rows are contiguous: [num_rows, size]."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...

    def linear_parts(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...

    def gated_linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...


@cache
def cuda_kernels() -> LayerKernels:
    # Imported by name: a CPU build of torch comes without Triton, and only a tensor on a GPU needs it.
    return cast(LayerKernels, importlib.import_module("baton.engine.cuda.layers"))
