"""Products of a few rows with a large weight through the tensor cores, at the speed of memory.

The weight's rows are the long side of the matrix instruction and the few rows of x the short one, so that nearly all
that moves to a program is weight. Where the tiles of the weight are too few to fill the GPU, each is cut along its
columns and the sums of the parts are left to the kernel behind, which reads its input anyway.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import NUM_PLANS, Launch, Signature, cdiv, is_packed, next_power_of_2, signature
from baton.engine.kernels.tuning import FewConfig

MAX_ROWS = 64
_MIN_ROWS = 16  # the shortest side of the asynchronous matrix instruction that the compiler uses


@triton.jit(do_not_specialize=["num_rows"])
def few_linear_kernel(
    x_ptr,  # [num_rows, IN_SIZE]
    weight_ptr,  # [out_size, IN_SIZE], contiguous; twice the rows, those of the gate first, when GATED
    bias_ptr,  # [out_size] or None
    out_ptr,  # [num_rows, out_size], or float32 [splits, num_rows, out_size]; contiguous
    num_rows,
    stride_x,
    out_size,
    IN_SIZE: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_OUT
    begin = tl.program_id(1) * SPLIT_SIZE
    o = tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)
    row = tl.arange(0, ROWS)
    # Rows past the end read the last one instead: a load without a mask is wide and needs no zeros.
    weight_row = weight_ptr + tl.minimum(first + o, out_size - 1).to(tl.int64) * IN_SIZE + begin
    up_offset = out_size.to(tl.int64) * IN_SIZE
    weight = weight_row[:, None] + i[None, :]
    x_at = x_ptr + (tl.minimum(row, num_rows - 1).to(tl.int64) * stride_x + begin)[:, None] + i[None, :]
    acc = tl.zeros([BLOCK_OUT, ROWS], tl.float32)
    up_acc = tl.zeros([BLOCK_OUT, ROWS], tl.float32)
    for start in tl.range(0, SPLIT_SIZE, BLOCK_IN, num_stages=STAGES):
        x = tl.trans(tl.load(x_at + start))
        acc = tl.dot(tl.load(weight + start), x, acc)
        if GATED:
            up_acc = tl.dot(tl.load(weight + up_offset + start), x, up_acc)
    if GATED:
        # Rounded where the separate kernels round.
        dtype = out_ptr.dtype.element_ty
        gate = acc.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.math.exp2(gate * -1.4426950408889634))).to(dtype).to(tl.float32)
        acc = silu * up_acc.to(dtype).to(tl.float32)
    out = first + o
    if HAS_BIAS:
        bias = tl.load(bias_ptr + out, mask=(out < out_size) & (begin == 0), other=0.0).to(tl.float32)
        acc += bias[:, None]
    out_row = (tl.program_id(1) * num_rows + row).to(tl.int64) * out_size
    mask = (out < out_size)[:, None] & (row < num_rows)[None, :]
    tl.store(out_ptr + out_row[None, :] + out[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask)


def few_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: FewConfig) -> torch.Tensor:
    """x [num_rows, in_size] times weight [out_size, in_size] transposed, plus bias. Legal in a CUDA graph.

    With `config.splits` > 1: float32 [splits, num_rows, out_size], of which the product is the sum. Sums in float32.
    Raises ValueError above MAX_ROWS rows, and where sizes do not fit.
    """
    return _product(x, weight, bias, config, gated=False)


def few_gated_linear(x: torch.Tensor, weight: torch.Tensor, config: FewConfig) -> torch.Tensor:
    """SiLU(x G^T) * (x U^T); weight [2 * out_size, in_size] holds G, then U.

    Rounds as the product and then `silu_mul` do. Legal in a CUDA graph. Raises ValueError.
    """
    return _product(x, weight, None, config, gated=True)


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: FewConfig, *, gated: bool
) -> torch.Tensor:
    with_bias = None if bias is None else signature(bias)
    launch, shape = _plan(x.get_device(), signature(x), signature(weight), with_bias, config, gated)
    out = torch.empty(shape, dtype=x.dtype if len(shape) == 2 else torch.float32, device=x.device)
    if launch is not None:
        launch(x, weight, bias, out)
    return out


@lru_cache(NUM_PLANS)
def _plan(
    device: int, x: Signature, weight: Signature, bias: Signature | None, config: FewConfig, gated: bool
) -> tuple[Launch | None, tuple[int, ...]]:
    """And the shape of the result. None where there is nothing to compute."""
    del device
    num_rows, in_size = x[0]
    if gated and (weight[0][0] % 2 or config.splits != 1):
        raise ValueError(f"takes an even number of outputs and no splits, got {tuple(weight[0])}, {config.splits}")
    out_size = weight[0][0] // 2 if gated else weight[0][0]
    if weight[0][1] != in_size or not is_packed(*weight[:2]) or x[1][1] != 1 or x[2] != weight[2]:
        raise ValueError(f"x {tuple(x[0])} and weight {tuple(weight[0])} do not fit")
    if num_rows > MAX_ROWS:
        raise ValueError(f"{num_rows} rows are not few")
    if in_size % (config.splits * config.block_in):
        raise ValueError(f"{in_size} columns are no multiple of {config.splits} splits of {config.block_in}")
    shape = (num_rows, out_size) if config.splits == 1 else (config.splits, num_rows, out_size)
    if num_rows == 0:
        return None, shape
    constants = {
        "IN_SIZE": in_size,
        "SPLIT_SIZE": in_size // config.splits,
        "HAS_BIAS": bias is not None,
        "GATED": gated,
        "ROWS": max(_MIN_ROWS, next_power_of_2(num_rows)),
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "STAGES": config.num_stages,
    }
    grid = (cdiv(out_size, config.block_out), config.splits)
    numbers = (num_rows, x[1][0], out_size)
    return Launch(few_linear_kernel, grid, numbers, constants, num_warps=config.num_warps), shape
