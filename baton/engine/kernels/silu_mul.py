"""SiLU(gate) * up of a fused gate-up product."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
    if gate_up.dim() != 2 or gate_up.stride(1) != 1 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [num_rows, 2 * size] with contiguous rows, got {tuple(gate_up.shape)}")
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    block = min(_BLOCK, triton.next_power_of_2(size))
    silu_mul_kernel[(num_rows, triton.cdiv(size, block))](
        gate_up, out, gate_up.stride(0), out.stride(0), SIZE=size, BLOCK=block, num_warps=4
    )
    return out
