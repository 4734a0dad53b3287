"""RMSNorm, optionally fused with the residual addition before it, and with the sum of a product's parts."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import NUM_PLANS, Launch, Signature, next_power_of_2, signature


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [num_rows, SIZE], or with SPLITS > 1 [SPLITS, num_rows, SIZE]
    residual_ptr,
    weight_ptr,
    out_ptr,
    stride_x,
    stride_split,
    stride_residual,
    stride_out,
    eps,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE_PAD)
    mask = i < SIZE
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * stride_x + i, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(x_ptr + split * stride_split + row * stride_x + i, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = residual_ptr + row * stride_residual + i
        total = (x + tl.load(residual, mask=mask, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(residual, total, mask=mask)
        x = total.to(tl.float32)  # the next layer reads the rounded sum: normalise the same values
    normed = x * tl.math.rsqrt(tl.sum(x * x) / SIZE + eps)
    # Rounded before the weight, as the models were trained.
    normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * stride_out + i, (normed * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """RMSNorm of x [num_rows, size] (rows may be strided); with `residual`, of residual + x, which replaces `residual`.

    x may also be [splits, num_rows, size] and stand for the sum of its parts. Returns a new tensor of weight's dtype.
    Raises ValueError.
    """
    with_residual = None if residual is None else signature(residual)
    launch = _plan(x.get_device(), signature(x), signature(weight), with_residual, eps)
    out = torch.empty(x.shape[-2:], dtype=weight.dtype, device=x.device)
    if launch is not None:
        launch(x, residual, weight, out)
    return out


@lru_cache(NUM_PLANS)
def _plan(device: int, x: Signature, weight: Signature, residual: Signature | None, eps: float) -> Launch | None:
    """None where there is nothing to compute."""
    del device
    (shape, strides, dtype, _), size = x, x[0][-1]
    if len(shape) not in (2, 3) or strides[-1] != 1 or weight[:2] != ((size,), (1,)):
        raise ValueError(f"x must be [num_rows, size] and weight [size], got {tuple(shape)}, {tuple(weight[0])}")
    if residual is not None and (residual[0] != shape[-2:] or residual[1][1] != 1):
        raise ValueError("residual must have the shape of x")
    if dtype != weight[2] and (len(shape) == 2 or dtype != torch.float32):
        raise ValueError(f"weight is {weight[2]}, the dtype of the result; x is {dtype}")
    num_rows = shape[-2]
    if num_rows == 0:
        return None
    size_pad = next_power_of_2(size)
    constants = {
        "SIZE": size,
        "SIZE_PAD": size_pad,
        "HAS_RESIDUAL": residual is not None,
        "SPLITS": shape[0] if len(shape) == 3 else 1,
    }
    stride_residual = residual[1][0] if residual is not None else 0
    numbers = (strides[-2], strides[0], stride_residual, size, eps)
    return Launch(rms_norm_kernel, (num_rows,), numbers, constants, num_warps=min(max(size_pad // 512, 1), 16))
