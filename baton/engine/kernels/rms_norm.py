"""RMSNorm, optionally fused with the residual addition before it, and with the sum of a product's parts."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
    num_rows, size = x.shape[-2:]
    if x.dim() not in (2, 3) or x.stride(-1) != 1 or weight.shape != (size,) or not weight.is_contiguous():
        raise ValueError(f"x must be [num_rows, size] and weight [size], got {tuple(x.shape)}, {tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape[-2:] or residual.stride(1) != 1):
        raise ValueError("residual must have the shape of x")
    if x.dtype != weight.dtype and (x.dim() == 2 or x.dtype != torch.float32):
        raise ValueError(f"weight is {weight.dtype}, the dtype of the result; x is {x.dtype}")
    out = torch.empty((num_rows, size), dtype=weight.dtype, device=x.device)
    if num_rows == 0:
        return out
    size_pad = triton.next_power_of_2(size)
    rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(-2),
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        eps,
        SIZE=size,
        SIZE_PAD=size_pad,
        HAS_RESIDUAL=residual is not None,
        SPLITS=x.shape[0] if x.dim() == 3 else 1,
        num_warps=min(max(size_pad // 512, 1), 16),
    )
    return out
