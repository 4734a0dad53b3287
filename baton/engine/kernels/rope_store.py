"""Rotary embedding of q and k in place, fused with the store of k and v into the paged cache."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import NUM_PLANS, Launch, Signature, cdiv, is_packed, next_power_of_2, signature

_HEADS_PER_PROGRAM = 16


@triton.jit
def _rotated(low_ptrs, high_ptrs, cos, sin, mask):
    low = tl.load(low_ptrs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(high_ptrs, mask=mask, other=0.0).to(tl.float32)
    dtype = low_ptrs.dtype.element_ty
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@triton.jit
def rope_store_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_ptr,  # [num_tokens, num_kv_heads, head_dim]
    v_ptr,  # like k
    positions_ptr,
    cos_sin_ptr,  # float32 [max_positions, head_dim]
    kv_ptr,  # [2, num_blocks * block_size, num_kv_heads, head_dim]
    slot_mapping_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    v_offset,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    Q_TILES: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    d = tl.arange(0, HALF_PAD)
    h = tl.arange(0, BLOCK_H)
    angles = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * HEAD_DIM + d
    cos = tl.load(angles, mask=d < HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF, mask=d < HALF, other=0.0)[None, :]
    if tile < Q_TILES:
        head = tile * BLOCK_H + h
        mask = (head < NUM_HEADS)[:, None] & (d < HALF)[None, :]
        q_low = q_ptr + token * stride_q_token + (head * stride_q_head)[:, None] + d[None, :]
        low, high = _rotated(q_low, q_low + HALF, cos, sin, mask)
        tl.store(q_low, low, mask=mask)
        tl.store(q_low + HALF, high, mask=mask)
    else:
        head = (tile - Q_TILES) * BLOCK_H + h
        mask = (head < NUM_KV_HEADS)[:, None] & (d < HALF)[None, :]
        k_low = k_ptr + token * stride_k_token + (head * stride_k_head)[:, None] + d[None, :]
        low, high = _rotated(k_low, k_low + HALF, cos, sin, mask)
        tl.store(k_low, low, mask=mask)
        tl.store(k_low + HALF, high, mask=mask)
        slot = tl.load(slot_mapping_ptr + token)
        # A padded row has slot -1: its address would lie before the cache.
        if slot >= 0:
            v_low = v_ptr + token * stride_v_token + (head * stride_v_head)[:, None] + d[None, :]
            cache = kv_ptr + slot * (NUM_KV_HEADS * HEAD_DIM) + (head * HEAD_DIM)[:, None] + d[None, :]
            tl.store(cache, low, mask=mask)
            tl.store(cache + HALF, high, mask=mask)
            tl.store(cache + v_offset, tl.load(v_low, mask=mask), mask=mask)
            tl.store(cache + v_offset + HALF, tl.load(v_low + HALF, mask=mask), mask=mask)


def rope_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    layer_kv: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See `AttentionBackend.rope_and_store`. Legal in a CUDA graph. Raises ValueError."""
    launch = _plan(
        q.get_device(),
        signature(q),
        signature(k),
        signature(v),
        signature(positions),
        signature(cos_sin),
        signature(layer_kv),
        signature(slot_mapping),
    )
    if launch is not None:
        launch(q, k, v, positions, cos_sin, layer_kv, slot_mapping)


@lru_cache(NUM_PLANS)
def _plan(
    device: int,
    q: Signature,
    k: Signature,
    v: Signature,
    positions: Signature,
    cos_sin: Signature,
    layer_kv: Signature,
    slot_mapping: Signature,
) -> Launch | None:
    """None where there is nothing to compute."""
    del device
    _check(q, k, v, positions, cos_sin, layer_kv, slot_mapping)
    num_tokens, num_heads, head_dim = q[0]
    num_kv_heads = k[0][1]
    if num_tokens == 0:
        return None
    block_h = min(_HEADS_PER_PROGRAM, next_power_of_2(max(num_heads, num_kv_heads)))
    grid = (num_tokens, cdiv(num_heads, block_h) + cdiv(num_kv_heads, block_h))
    numbers = (*q[1][:2], *k[1][:2], *v[1][:2], layer_kv[1][0])
    constants = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "HALF_PAD": next_power_of_2(head_dim // 2),
        "BLOCK_H": block_h,
    }
    return Launch(rope_store_kernel, grid, numbers, constants, num_warps=4)


def _check(
    q: Signature,
    k: Signature,
    v: Signature,
    positions: Signature,
    cos_sin: Signature,
    layer_kv: Signature,
    slot_mapping: Signature,
) -> None:
    num_tokens, _, head_dim = q[0]
    if k[0] != v[0] or k[0][0] != num_tokens or k[0][2] != head_dim or head_dim % 2:
        raise ValueError(f"shapes do not fit: q {tuple(q[0])}, k {tuple(k[0])}, v {tuple(v[0])}")
    if layer_kv[0][0] != 2 or layer_kv[0][3:] != k[0][1:] or not is_packed(layer_kv[0][1:], layer_kv[1][1:]):
        raise ValueError(f"layer_kv {tuple(layer_kv[0])} does not fit k {tuple(k[0])}")
    if not q[2] == k[2] == v[2] == layer_kv[2]:
        raise ValueError("q, k, v and the cache must have one dtype")
    if cos_sin[2] != torch.float32 or cos_sin[0][1] != head_dim or not is_packed(*cos_sin[:2]):
        raise ValueError(f"cos_sin must be contiguous float32 [max_positions, {head_dim}]")
    if positions[0] != (num_tokens,) or slot_mapping[0] != (num_tokens,) or slot_mapping[2] != torch.int64:
        raise ValueError(f"positions and slot_mapping (int64) must have {num_tokens} entries")
    if any(x[1][2] != 1 for x in (q, k, v)):
        raise ValueError("the last dimension of q, k and v must be contiguous")
