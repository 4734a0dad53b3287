"""How contexts are cut into splits, on the device, and how what these give is merged. See `decode_attention`."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plan_splits(context_lens_ptr, num_seqs, programs, min_tiles, NUM_SEQS_PAD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles per split, splits of each sequence (at least one, so that an empty row is written too), and their ends.

    Their sum is at most `programs + num_seqs`: the extent of the grid and of the scratch buffers.
    """
    i = tl.arange(0, NUM_SEQS_PAD)
    context_lens = tl.load(context_lens_ptr + i, mask=i < num_seqs, other=0)
    tiles = (context_lens + BLOCK_N - 1) // BLOCK_N
    split_tiles = tl.maximum((tl.sum(tiles) + programs - 1) // programs, min_tiles)
    splits = tl.where(i < num_seqs, tl.maximum((tiles + split_tiles - 1) // split_tiles, 1), 0)
    return split_tiles, splits, tl.cumsum(splits)


@triton.jit(do_not_specialize=["num_seqs", "programs", "min_tiles"])
def merge_splits_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    context_lens_ptr,
    num_seqs,
    programs,
    min_tiles,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SEQS_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(0)
    seq = tl.program_id(1)
    _, splits, _ = plan_splits(context_lens_ptr, num_seqs, programs, min_tiles, NUM_SEQS_PAD, BLOCK_N)
    i = tl.arange(0, NUM_SEQS_PAD)
    num_splits = tl.sum(tl.where(i == seq, splits, 0))
    if num_splits == 1:
        return  # written by the attention kernel
    first = tl.sum(tl.where(i < seq, splits, 0))
    d = tl.arange(0, HEAD_DIM_PAD)
    maximum = float("-inf")
    total = 0.0
    acc = tl.zeros([HEAD_DIM_PAD], tl.float32)
    for start in range(0, num_splits, TILE):
        split = start + tl.arange(0, TILE)
        row = (first + split).to(tl.int64) * NUM_HEADS + head
        lse = tl.load(lse_ptr + row, mask=split < num_splits, other=float("-inf"))
        # Scratch beyond the last split is not initialised: masked, not multiplied by zero.
        mask = (split < num_splits)[:, None] & (d < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + (row * HEAD_DIM)[:, None] + d[None, :], mask=mask, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(lse))
        weight = tl.math.exp2(lse - new_maximum)
        alpha = tl.math.exp2(maximum - new_maximum)
        acc = acc * alpha + tl.sum(partial * weight[:, None], 0)
        total = total * alpha + tl.sum(weight)
        maximum = new_maximum
    out = out_ptr + (seq.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + d
    tl.store(out, (acc / total).to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
