"""Products of one row with a large weight: they read the weight once, so they should run at the speed of memory.

The weight's rows are spread over many small programs, each of which walks along its rows with several loads in flight.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import NUM_PLANS, Launch, Signature, cdiv, is_packed, signature
from baton.engine.kernels.tuning import ThinConfig


@triton.jit
def thin_linear_kernel(
    x_ptr,  # [IN_SIZE]
    weight_ptr,  # [out_size, IN_SIZE], contiguous; twice the rows, those of the gate first, when GATED
    bias_ptr,  # [out_size] or None
    out_ptr,  # [out_size]
    out_size,
    IN_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)
    is_out = out < out_size
    weight = weight_ptr + (out.to(tl.int64) * IN_SIZE)[:, None] + i[None, :]
    acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    up_acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    up_offset = out_size.to(tl.int64) * IN_SIZE
    for start in tl.range(0, IN_SIZE, BLOCK_IN, num_stages=STAGES):
        mask = start + i < IN_SIZE
        w = tl.load(weight + start, mask=is_out[:, None] & mask[None, :], other=0.0)
        x = tl.load(x_ptr + start + i, mask=mask, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
        if GATED:
            up = tl.load(weight + up_offset + start, mask=is_out[:, None] & mask[None, :], other=0.0)
            up_acc += up.to(tl.float32) * x.to(tl.float32)[None, :]
    total = tl.sum(acc, 1)
    if GATED:
        # Rounded where the separate kernels round.
        dtype = out_ptr.dtype.element_ty
        gate = total.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.math.exp2(gate * -1.4426950408889634))).to(dtype).to(tl.float32)
        total = silu * tl.sum(up_acc, 1).to(dtype).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + out, mask=is_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + out, total.to(out_ptr.dtype.element_ty), mask=is_out)


def thin_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: ThinConfig) -> torch.Tensor:
    """x [1, in_size] times weight [out_size, in_size] transposed, plus bias. Legal in a CUDA graph.

    Sums in float32. Raises ValueError.
    """
    return _product(x, weight, bias, config, gated=False)


def thin_gated_linear(x: torch.Tensor, weight: torch.Tensor, config: ThinConfig) -> torch.Tensor:
    """SiLU(x G^T) * (x U^T); weight [2 * out_size, in_size] holds G, then U.

    Rounds as the product and then `silu_mul` do. Legal in a CUDA graph. Raises ValueError.
    """
    return _product(x, weight, None, config, gated=True)


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: ThinConfig, *, gated: bool
) -> torch.Tensor:
    with_bias = None if bias is None else signature(bias)
    launch = _plan(x.get_device(), signature(x), signature(weight), with_bias, config, gated)
    out_size = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((1, out_size), dtype=x.dtype, device=x.device)
    launch(x, weight, bias, out)
    return out


@lru_cache(NUM_PLANS)
def _plan(
    device: int, x: Signature, weight: Signature, bias: Signature | None, config: ThinConfig, gated: bool
) -> Launch:
    del device
    if gated and weight[0][0] % 2:
        raise ValueError(f"takes an even number of outputs, got {tuple(weight[0])}")
    num_rows, in_size = x[0]
    out_size = weight[0][0] // 2 if gated else weight[0][0]
    fits = num_rows == 1 and weight[0][1] == in_size and x[1][1] == 1 and x[2] == weight[2]
    if not fits or not is_packed(*weight[:2]):
        raise ValueError(f"x {tuple(x[0])} and weight {tuple(weight[0])} do not fit")
    constants = {
        "IN_SIZE": in_size,
        "HAS_BIAS": bias is not None,
        "GATED": gated,
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "STAGES": config.num_stages,
    }
    grid = (cdiv(out_size, config.block_out),)
    return Launch(thin_linear_kernel, grid, (out_size,), constants, num_warps=config.num_warps)
