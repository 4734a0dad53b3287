"""Online-softmax attention over a range of a paged KV cache: the part that the prefill and the decode kernel share."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import Signature, is_packed


@triton.jit
def _block_ids(table_ptr, start, last_entry, n, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Physical blocks of the tile at `start`: a scalar when the tile lies in one block, else one per position.

    Entries past `last_entry` are never read. All rows of a block read the same entry, which costs one cached line and
    no exchange between threads.
    """
    entry = start // BLOCK_SIZE if BLOCK_N <= BLOCK_SIZE else (start + n) // BLOCK_SIZE
    return tl.load(table_ptr + tl.minimum(entry, last_entry))


@triton.jit
def _attend_tile(
    q,  # [ROWS, HEAD_DIM_PAD]
    acc,  # [ROWS, HEAD_DIM_PAD] float32
    row_sum,  # [ROWS] float32
    row_max,  # [ROWS] float32, in the exponent's base 2
    last_visible,  # [ROWS] last position that a row may see; used when MASKED
    k_ptr,  # first element of this KV head in block 0
    v_offset,  # elements from K to V
    blocks,  # of _block_ids
    start,  # first position of the tile, a multiple of BLOCK_N
    end,  # positions from here on are not read; used when MASKED
    scale_log2,
    stride_block,
    stride_slot,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM_PAD)
    position = start + n
    slot = start % BLOCK_SIZE + n if BLOCK_N <= BLOCK_SIZE else n % BLOCK_SIZE
    pointers = k_ptr + (blocks.to(tl.int64) * stride_block + slot * stride_slot)[:, None] + d[None, :]

    # Slots past the end of the context may hold anything, NaN included, and 0 * NaN is NaN: they must not be loaded.
    if MASKED and HEAD_DIM != HEAD_DIM_PAD:
        mask = (position < end)[:, None] & (d < HEAD_DIM)[None, :]
    elif MASKED:
        mask = (position < end)[:, None]
    elif HEAD_DIM != HEAD_DIM_PAD:
        mask = (d < HEAD_DIM)[None, :]
    k = tl.load(pointers, mask=mask, other=0.0) if MASKED or HEAD_DIM != HEAD_DIM_PAD else tl.load(pointers)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(position[None, :] <= last_visible[:, None], scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    p = tl.math.exp2(scores * scale_log2 - new_max[:, None])
    alpha = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * alpha + tl.sum(p, 1)

    pointers += v_offset
    v = tl.load(pointers, mask=mask, other=0.0) if MASKED or HEAD_DIM != HEAD_DIM_PAD else tl.load(pointers)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, row_sum, new_max


@triton.jit
def attend_range(
    q,  # [ROWS, HEAD_DIM_PAD]
    last_visible,  # [ROWS] last position that a row may see
    k_ptr,  # first element of this KV head in block 0
    v_offset,  # elements from K to V
    table_ptr,  # block table of this sequence, at least one entry
    begin,  # a multiple of BLOCK_N
    full_end,  # a multiple of BLOCK_N: positions in [begin, full_end) are visible to every row
    end,  # positions from here on are not read
    scale_log2,  # softmax scale times log2(e), so that exp2 does for exp
    stride_block,
    stride_slot,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax numerator [ROWS, HEAD_DIM_PAD], denominator and base-2 maximum [ROWS] over positions [begin, end).

    Every row must see `begin`, or its maximum stays infinite and its output becomes NaN.
    """
    n = tl.arange(0, BLOCK_N)
    last_entry = tl.maximum(end - 1, 0) // BLOCK_SIZE
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM_PAD], tl.float32)
    # Unrolled: the loop without masks, then the one with masks for what is left.
    for masked in tl.static_range(2):
        first = full_end if masked else begin
        last = end if masked else full_end
        # The ids of a tile are loaded one tile ahead and carried: loaded where they are used, they would become a stage
        # of their own in the software pipeline and halve the number of K and V tiles in flight.
        blocks = _block_ids(table_ptr, first, last_entry, n, BLOCK_SIZE, BLOCK_N)
        for start in range(first, last, BLOCK_N):
            acc, row_sum, row_max = _attend_tile(
                q,
                acc,
                row_sum,
                row_max,
                last_visible,
                k_ptr,
                v_offset,
                blocks,
                start,
                end,
                scale_log2,
                stride_block,
                stride_slot,
                HEAD_DIM,
                HEAD_DIM_PAD,
                BLOCK_SIZE,
                BLOCK_N,
                masked,
                PRECISION,
            )
            blocks = _block_ids(table_ptr, start + BLOCK_N, last_entry, n, BLOCK_SIZE, BLOCK_N)
    return acc, row_sum, row_max


def dot_precision(dtype: torch.dtype) -> str:
    """TF32 would cost float32 half of its digits; other types ignore the setting."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_cache(q: Signature, layer_kv: Signature) -> None:
    """Raise ValueError unless `q` and `layer_kv` have the layout that the attention kernels address."""
    (shape, strides, dtype, _), (kv_shape, kv_strides, kv_dtype, _) = q, layer_kv
    if len(kv_shape) != 5 or kv_shape[0] != 2:
        message = f"layer_kv must be [2, num_blocks, block_size, num_kv_heads, head_dim], got {tuple(kv_shape)}"
        raise ValueError(message)
    _, _, block_size, num_kv_heads, head_dim = kv_shape
    if not is_packed(kv_shape[1:], kv_strides[1:]):
        raise ValueError("K and V of a layer must each be contiguous")
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"block_size must be 16, 32, 64 or 128, got {block_size}")
    if len(shape) != 3 or shape[2] != head_dim or shape[1] % num_kv_heads:
        raise ValueError(f"q {tuple(shape)} does not fit a cache with {num_kv_heads} KV heads of {head_dim}")
    if strides[2] != 1:
        raise ValueError("the last dimension of q must be contiguous")
    if dtype != kv_dtype:
        raise ValueError(f"q is {dtype}, the cache is {kv_dtype}")


def check_output(q: Signature, out: Signature, scale: float) -> None:
    """Raise ValueError unless attention of `q` can be written to `out`."""
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if out[0] != q[0] or not is_packed(*out[:2]):
        raise ValueError("out must be contiguous and have the shape of q")
