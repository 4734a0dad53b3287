"""The gated activation between the two halves of an MLP, with the product before it."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from baton.engine.layers.device import cuda_kernels
from baton.engine.layers.linear import FusedLinear


def gated_linear(x: torch.Tensor, gate_up: FusedLinear) -> torch.Tensor:
    """SiLU(gate) * up. `gate_up` gives 2 * size outputs, the gate first. Returns [num_tokens, size]."""
    if x.is_cuda:
        return cuda_kernels().gated_linear(x, gate_up.weight, gate_up.bias)
    gate, up = gate_up(x).chunk(2, dim=-1)
    return silu(gate) * up
