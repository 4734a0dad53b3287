"""Causal attention of prompt segments over a paged cache that may already hold a prefix.

A program owns BLOCK_M rows: the query heads of one KV head for BLOCK_M // GROUP consecutive tokens, so each K and V
tile is read once for the whole group. Where the lengths are known on the device only, programs find their sequence
there.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import NUM_PLANS, Launch, Signature, cdiv, next_power_of_2, signature
from baton.engine.kernels.paged import attend_range, check_cache, check_output, dot_precision
from baton.engine.kernels.tuning import PrefillConfig


@triton.jit
def _flat_tile(cu_seqlens_q_ptr, first_seq, num_seqs, tile, TOKENS: tl.constexpr, NUM_SEQS_PAD: tl.constexpr):
    """Sequence and first token of a tile when those of all sequences are numbered in a row.

    Tiles beyond the last one begin at or beyond the last sequence's end.
    """
    i = tl.arange(0, NUM_SEQS_PAD)
    starts = cu_seqlens_q_ptr + first_seq + i
    begin = tl.load(starts, mask=i < num_seqs, other=0)
    tiles = (tl.load(starts + 1, mask=i < num_seqs, other=0) - begin + TOKENS - 1) // TOKENS
    seq = tl.sum(((tl.cumsum(tiles) <= tile) & (i < num_seqs)).to(tl.int32))
    seq = tl.minimum(seq, num_seqs - 1)
    return first_seq + seq, (tile - tl.sum(tl.where(i < seq, tiles, 0))) * TOKENS


# Integers that change from step to step are not specialised: a new class of values would compile again while serving.
@triton.jit(do_not_specialize=["first_seq", "num_seqs", "stride_table"])
def prefill_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    kv_ptr,  # [2, num_blocks, block_size, num_kv_heads, head_dim]
    out_ptr,  # [num_tokens, num_heads, head_dim], contiguous
    cu_seqlens_q_ptr,
    context_lens_ptr,
    block_tables_ptr,
    scale_log2,
    first_seq,
    num_seqs,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    v_offset,
    stride_block,
    stride_slot,
    stride_table,
    NUM_SEQS_PAD: tl.constexpr,  # 0: a grid over tiles, KV heads and sequences; else over tiles of all and KV heads
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    # The last tokens have the longest context: they start first, so that no long program is left for the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if NUM_SEQS_PAD:
        seq, first_token = _flat_tile(cu_seqlens_q_ptr, first_seq, num_seqs, tile, TOKENS, NUM_SEQS_PAD)
    else:
        seq = first_seq + tl.program_id(2)
        first_token = tile * TOKENS
    seq_start = tl.load(cu_seqlens_q_ptr + seq)
    num_new = tl.load(cu_seqlens_q_ptr + seq + 1) - seq_start
    if first_token >= num_new:
        return
    context_len = tl.load(context_lens_ptr + seq)
    prefix = context_len - num_new

    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM_PAD)
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < TOKENS * GROUP) & (token < num_new)
    row_mask = is_row[:, None] & (d < HEAD_DIM)[None, :]
    at = (seq_start + token).to(tl.int64)
    q = tl.load(q_ptr + (at * stride_q_token + head * stride_q_head)[:, None] + d[None, :], mask=row_mask, other=0.0)

    last_visible = prefix + token
    k_ptr = kv_ptr + kv_head * HEAD_DIM
    table_ptr = block_tables_ptr + seq.to(tl.int64) * stride_table
    end = tl.minimum(prefix + first_token + TOKENS, context_len)
    # Positions below full_end are visible to every row. Row 0 sees position 0, so no row's maximum stays infinite.
    full_end = (prefix + first_token + 1) // BLOCK_N * BLOCK_N
    acc, row_sum, _ = attend_range(
        q,
        last_visible,
        k_ptr,
        v_offset,
        table_ptr,
        0,
        full_end,
        end,
        scale_log2,
        stride_block,
        stride_slot,
        BLOCK_M,
        HEAD_DIM,
        HEAD_DIM_PAD,
        BLOCK_SIZE,
        BLOCK_N,
        PRECISION,
    )
    out = out_ptr + (at * stride_out_token + head * HEAD_DIM)[:, None] + d[None, :]
    tl.store(out, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=row_mask)


def prefill_attention(
    q: torch.Tensor,
    layer_kv: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    first_seq: int,
    max_seqlen_q: int,
    scale: float,
    config: PrefillConfig,
    max_new_tokens: int = 0,
) -> None:
    """Fill the rows of `out` that belong to sequences [first_seq, num_seqs). No host synchronisation.

    out: like q, contiguous. `max_seqlen_q` is an upper bound of these sequences' new tokens. `max_new_tokens`, unless
    0, is one of all their new tokens together: the grid then depends on nothing else, so that in a CUDA graph the
    lengths may change, to none at all. Raises ValueError.
    """
    launch = _plan(
        q.get_device(),
        signature(q),
        signature(layer_kv),
        signature(out),
        signature(cu_seqlens_q),
        signature(context_lens),
        signature(block_tables),
        first_seq,
        max_seqlen_q,
        scale,
        config,
        max_new_tokens,
    )
    if launch is not None:
        launch(q, layer_kv, out, cu_seqlens_q, context_lens, block_tables)


@lru_cache(NUM_PLANS)
def _plan(
    device: int,
    q: Signature,
    layer_kv: Signature,
    out: Signature,
    cu_seqlens_q: Signature,
    context_lens: Signature,
    block_tables: Signature,
    first_seq: int,
    max_seqlen_q: int,
    scale: float,
    config: PrefillConfig,
    max_new_tokens: int,
) -> Launch | None:
    """None where there is nothing to compute."""
    del device, cu_seqlens_q
    check_cache(q, layer_kv)
    check_output(q, out, scale)
    _, _, block_size, num_kv_heads, head_dim = layer_kv[0]
    num_seqs = context_lens[0][0] - first_seq
    group = q[0][1] // num_kv_heads
    if num_seqs <= 0 or max_seqlen_q <= 0:
        return None
    block_m = max(config.block_m, next_power_of_2(group))  # at least one token
    tokens = block_m // group
    if max_new_tokens:
        grid = (cdiv(max_new_tokens, tokens) + num_seqs, num_kv_heads, 1)
    else:
        grid = (cdiv(max_seqlen_q, tokens), num_kv_heads, num_seqs)
    numbers = (
        scale * math.log2(math.e),
        first_seq,
        num_seqs,
        *q[1][:2],
        out[1][0],
        *layer_kv[1][:3],
        block_tables[1][0],
    )
    constants = {
        "NUM_SEQS_PAD": next_power_of_2(num_seqs) if max_new_tokens else 0,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PAD": max(16, next_power_of_2(head_dim)),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": dot_precision(q[2]),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Launch(prefill_attention_kernel, grid, numbers, constants, **options)
