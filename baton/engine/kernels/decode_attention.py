"""Attention of one new token per sequence over its paged context, split along the context, then merged.

How the contexts are split is computed on the device from `context_lens`, the same way in both kernels, and the grid
depends on the batch size only: a captured CUDA graph stays right when the lengths change. Contexts are cut into splits
of one common length, so that a long sequence in a batch of short ones gets more programs.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from baton.engine.kernels.decode_splits import merge_splits_kernel, plan_splits
from baton.engine.kernels.launch import NUM_PLANS, Launch, Signature, next_power_of_2, signature
from baton.engine.kernels.paged import attend_range, check_cache, check_output, dot_precision
from baton.engine.kernels.tuning import DecodeConfig

_MERGE_TILE = 16


@triton.jit(do_not_specialize=["num_seqs", "programs", "min_tiles", "stride_table"])
def decode_attention_kernel(
    q_ptr,  # [num_seqs, num_heads, head_dim]
    kv_ptr,  # [2, num_blocks, block_size, num_kv_heads, head_dim]
    out_ptr,  # [num_seqs, num_heads, head_dim], contiguous
    partial_ptr,  # float32 [programs + num_seqs, num_heads, head_dim]
    lse_ptr,  # float32 [programs + num_seqs, num_heads], base 2
    context_lens_ptr,
    block_tables_ptr,
    scale_log2,
    num_seqs,
    programs,
    min_tiles,
    stride_q_seq,
    stride_q_head,
    v_offset,
    stride_block,
    stride_slot,
    stride_table,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SEQS_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # KV heads run fastest: neighbours in the grid read neighbouring memory.
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    split_tiles, splits, ends = plan_splits(context_lens_ptr, num_seqs, programs, min_tiles, NUM_SEQS_PAD, BLOCK_N)
    if item >= tl.sum(splits):
        return
    i = tl.arange(0, NUM_SEQS_PAD)
    seq = tl.sum(((ends <= item) & (i < num_seqs)).to(tl.int32))
    num_splits = tl.sum(tl.where(i == seq, splits, 0))
    split = item - tl.sum(tl.where(i < seq, splits, 0))
    context_len = tl.load(context_lens_ptr + seq)
    begin = split * split_tiles * BLOCK_N
    end = tl.minimum(begin + split_tiles * BLOCK_N, context_len)

    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, HEAD_DIM_PAD)
    head = kv_head * GROUP + g
    row_mask = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    q_row = q_ptr + seq.to(tl.int64) * stride_q_seq
    q = tl.load(q_row + (head * stride_q_head)[:, None] + d[None, :], mask=row_mask, other=0.0)

    last_visible = tl.zeros([GROUP_PAD], tl.int32) + (end - 1)
    k_ptr = kv_ptr + kv_head * HEAD_DIM
    table_ptr = block_tables_ptr + seq.to(tl.int64) * stride_table
    full_end = end // BLOCK_N * BLOCK_N
    acc, row_sum, row_max = attend_range(
        q,
        last_visible,
        k_ptr,
        v_offset,
        table_ptr,
        begin,
        full_end,
        end,
        scale_log2,
        stride_block,
        stride_slot,
        GROUP_PAD,
        HEAD_DIM,
        HEAD_DIM_PAD,
        BLOCK_SIZE,
        BLOCK_N,
        PRECISION,
    )
    # An empty context (a padded row) has sum 0 and gives zeros.
    acc = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
    if num_splits == 1:
        out = out_ptr + seq.to(tl.int64) * (NUM_HEADS * HEAD_DIM) + (head * HEAD_DIM)[:, None] + d[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_mask)
    else:
        row = item.to(tl.int64) * NUM_HEADS + head
        tl.store(partial_ptr + (row * HEAD_DIM)[:, None] + d[None, :], acc, mask=row_mask)
        tl.store(lse_ptr + row, row_max + tl.math.log2(row_sum), mask=g < GROUP)


def decode_attention(
    q: torch.Tensor,
    layer_kv: torch.Tensor,
    out: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    num_seqs: int,
    scale: float,
    config: DecodeConfig,
) -> None:
    """Fill out[:num_seqs] for q[:num_seqs]; rows with context length 0 become zero. Legal in a CUDA graph.

    out: like q, contiguous. Raises ValueError.
    """
    launches = _plan(
        q.get_device(),
        signature(q),
        signature(layer_kv),
        signature(out),
        signature(context_lens),
        signature(block_tables),
        num_seqs,
        scale,
        config,
    )
    if launches is None:
        return
    attend, merge = launches
    items, num_heads, head_dim = config.programs + num_seqs, *q.shape[1:]
    partial = torch.empty((items, num_heads, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((items, num_heads), dtype=torch.float32, device=q.device)
    attend(q, layer_kv, out, partial, lse, context_lens, block_tables)
    merge(out, partial, lse, context_lens)


@lru_cache(NUM_PLANS)
def _plan(
    device: int,
    q: Signature,
    layer_kv: Signature,
    out: Signature,
    context_lens: Signature,
    block_tables: Signature,
    num_seqs: int,
    scale: float,
    config: DecodeConfig,
) -> tuple[Launch, Launch] | None:
    """None where there is nothing to compute."""
    del device, context_lens
    check_cache(q, layer_kv)
    check_output(q, out, scale)
    if num_seqs == 0:
        return None
    _, _, block_size, num_kv_heads, head_dim = layer_kv[0]
    num_heads = q[0][1]
    group = num_heads // num_kv_heads
    plan_numbers = (num_seqs, config.programs, config.min_tiles)
    plan_constants = {"BLOCK_N": config.block_n, "NUM_SEQS_PAD": next_power_of_2(num_seqs)}
    heads = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "HEAD_DIM_PAD": max(16, next_power_of_2(head_dim))}
    numbers = (scale * math.log2(math.e), *plan_numbers, *q[1][:2], *layer_kv[1][:3], block_tables[1][0])
    constants = {
        **heads,
        **plan_constants,
        "GROUP": group,
        "GROUP_PAD": max(16, next_power_of_2(group)),
        "BLOCK_SIZE": block_size,
        "PRECISION": dot_precision(q[2]),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    attend = Launch(decode_attention_kernel, (num_kv_heads, config.programs + num_seqs), numbers, constants, **options)
    constants = {**heads, **plan_constants, "TILE": _MERGE_TILE}
    return attend, Launch(merge_splits_kernel, (num_heads, num_seqs), plan_numbers, constants, num_warps=4)
