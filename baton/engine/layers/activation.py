"""The gated activation between the two halves of an MLP."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from baton.engine.layers.device import cuda_kernels


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: [num_tokens, 2 * intermediate_size], the gate first. Returns [num_tokens, intermediate_size]."""
    if gate_up.is_cuda:
        return cuda_kernels().silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
