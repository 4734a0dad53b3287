"""SiLU(gate) * up of a fused gate-up product."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import NUM_PLANS, Launch, Signature, cdiv, next_power_of_2, signature

_BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, stride_in, stride_out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < SIZE
    gate = tl.load(gate_up_ptr + row * stride_in + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_in + SIZE + i, mask=mask, other=0.0).to(tl.float32)
    # exp2 overflows to infinity for very negative gates, which gives the right limit, -0.
    silu = gate / (1.0 + tl.math.exp2(gate * -1.4426950408889634))
    silu = silu.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * stride_out + i, (silu * up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[num_rows, 2 * size], gate first, to a new [num_rows, size]. Raises ValueError."""
    launch = _plan(gate_up.get_device(), signature(gate_up))
    out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    if launch is not None:
        launch(gate_up, out)
    return out


@lru_cache(NUM_PLANS)
def _plan(device: int, gate_up: Signature) -> Launch | None:
    """None where there is nothing to compute."""
    del device
    shape, strides, _, _ = gate_up
    if len(shape) != 2 or strides[1] != 1 or shape[1] % 2:
        raise ValueError(f"gate_up must be [num_rows, 2 * size] with contiguous rows, got {tuple(shape)}")
    num_rows, size = shape[0], shape[1] // 2
    if num_rows == 0:
        return None
    block = min(_BLOCK, next_power_of_2(size))
    grid = (num_rows, cdiv(size, block))
    return Launch(silu_mul_kernel, grid, (strides[0], size), {"SIZE": size, "BLOCK": block}, num_warps=4)
