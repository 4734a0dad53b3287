"""Attention in plain torch: the backend of CPU workers, and what the kernels are compared with.

Work in Python is per sequence, never per token. Stateless; called on the engine thread.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from baton.engine.attention.base import AttentionMetadata

# Padded tokens that a batched decode may gather for each sequence before one call per sequence is cheaper.
_PADDING_PER_SEQ = 512


class TorchBackend:
    """Implements `AttentionBackend` on any device."""

    def rope_and_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        layer_kv: torch.Tensor,
        meta: AttentionMetadata,
    ) -> None:
        cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, head_dim / 2]
        _rotate(q, cos, sin)
        _rotate(k, cos, sin)
        _store(k, v, layer_kv, meta.slot_mapping)

    def attend(
        self,
        q: torch.Tensor,
        layer_kv: torch.Tensor,
        meta: AttentionMetadata,
        scale: float,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        del fresh
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        context_lens = meta.context_lens.tolist()
        n = meta.num_decodes
        if n and _batching_pays(context_lens[:n]):
            out[:n] = _decode_batch(q[:n], layer_kv, meta, max(context_lens[:n]), scale)
            first = n
        else:
            first = 0
        starts = meta.cu_seqlens_q.tolist()
        for i in range(first, meta.num_seqs):
            rows = slice(starts[i], starts[i + 1])
            out[rows] = _attend_one(q[rows], layer_kv, meta.block_tables[i], context_lens[i], scale)
        return out


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    low, high = x.float().chunk(2, dim=-1)
    x.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))


def _store(k: torch.Tensor, v: torch.Tensor, layer_kv: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    stored = slot_mapping >= 0
    if not bool(stored.all()):
        k, v, slot_mapping = k[stored], v[stored], slot_mapping[stored]
    slots = layer_kv.view(2, -1, *layer_kv.shape[3:])  # [2, num_blocks * block_size, num_kv_heads, head_dim]
    slots[0].index_copy_(0, slot_mapping, k)
    slots[1].index_copy_(0, slot_mapping, v)


def _batching_pays(context_lens: list[int]) -> bool:
    padded = len(context_lens) * max(context_lens) - sum(context_lens)
    return max(context_lens) > 0 and padded <= sum(context_lens) + _PADDING_PER_SEQ * len(context_lens)


def _decode_batch(
    q: torch.Tensor, layer_kv: torch.Tensor, meta: AttentionMetadata, max_context: int, scale: float
) -> torch.Tensor:
    """One query token per sequence, all sequences padded to `max_context`: [num_decodes, num_heads, head_dim]."""
    n, num_heads, head_dim = q.shape
    block_size, num_kv_heads = layer_kv.shape[2], layer_kv.shape[3]
    lens = meta.context_lens[:n].long().unsqueeze(1)  # [n, 1]
    steps = torch.arange(max_context, device=q.device)
    # Beyond its context a sequence reads its own last token again: a slot that nobody wrote may hold NaN, and a zero
    # probability does not hide that.
    at = torch.minimum(steps, (lens - 1).clamp(min=0))  # [n, max_context]
    blocks = meta.block_tables[:n].long().gather(1, at // block_size).clamp(min=0)
    slots = torch.where(lens > 0, blocks * block_size + at % block_size, 0).flatten()
    k, v = (
        cache.view(-1, num_kv_heads, head_dim)[slots].view(n, max_context, num_kv_heads, head_dim).transpose(1, 2)
        for cache in layer_kv.unbind()
    )
    grouped = q.reshape(n, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = (steps < lens)[:, None, None]  # [n, 1, 1, max_context]
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return out.reshape(n, num_heads, head_dim).masked_fill_((lens == 0)[:, :, None], 0.0)


def _attend_one(
    q: torch.Tensor, layer_kv: torch.Tensor, block_table: torch.Tensor, context_len: int, scale: float
) -> torch.Tensor:
    """The last `len(q)` tokens of one sequence over its whole context: [len(q), num_heads, head_dim]."""
    if context_len == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = layer_kv.shape[2], layer_kv.shape[3]
    blocks = block_table[: -(-context_len // block_size)].long()
    group = num_heads // num_kv_heads
    k, v = (
        cache[blocks].view(-1, num_kv_heads, head_dim)[:context_len].transpose(0, 1).unsqueeze(0)
        for cache in layer_kv.unbind()
    )  # [1, num_kv_heads, context_len, head_dim]
    if num_tokens == 1:
        grouped = q.reshape(1, num_kv_heads, group, head_dim)
        return scaled_dot_product_attention(grouped, k, v, scale=scale).reshape(1, num_heads, head_dim)
    mask = None
    if num_tokens < context_len:
        mask = torch.ones(num_tokens, context_len, dtype=torch.bool, device=q.device).tril(context_len - num_tokens)
    heads = q.transpose(0, 1).unsqueeze(0)  # [1, num_heads, num_tokens, head_dim]
    out = scaled_dot_product_attention(
        heads, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=group > 1
    )
    return out[0].transpose(0, 1)
