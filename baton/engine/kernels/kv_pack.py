"""Gather of KV blocks into a contiguous segment and scatter back, with a 64-bit fingerprint per block on the way.

A segment is [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]. The fingerprint of a block reads its data
of the segment as 32-bit words in the order (layer, K/V, slot, head, dim):
h = sum of word_j * (splitmix64(j) | 1) mod 2^64, fingerprint = splitmix64(h ^ salt). Addition mod 2^64 has no order,
so the atomic sums below give the same bits on every run.

The callers are the transfer threads; everything runs on their current stream, and nothing waits for it here.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import cdiv, next_power_of_2

_WORDS_PER_PROGRAM = 1024
_BLOCKS_PER_PROGRAM = 8  # also of fewer: a compiled kernel more would cost far more than the masked turns of a loop


@triton.jit
def splitmix64(x):
    z = x + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["layer_start", "num_blocks"])
def move_blocks_kernel(
    kv_ptr,  # int32 words of the cache, [num_layers, 2, num_cache_blocks, PLANE]
    segment_ptr,  # int32 words of the segment, [num_segment_layers, 2, num_blocks, PLANE]
    block_ids_ptr,
    sums_ptr,  # int64 [num_blocks], zeroed
    layer_start,
    num_blocks,
    stride_layer,  # words from layer to layer of the cache; its K and V planes lie stride_plane apart
    stride_plane,
    PLANE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PACK: tl.constexpr,
):
    plane = tl.program_id(1)  # layer within the segment, times 2, plus 1 for V
    i = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mask = i < PLANE
    # Two 64-bit products per word cost more than the copy: one factor serves several blocks.
    factor = splitmix64((plane * PLANE + i).to(tl.uint64)) | 1
    layer = (layer_start + plane // 2).to(tl.int64)
    cache = kv_ptr + layer * stride_layer + (plane % 2).to(tl.int64) * stride_plane + i
    segment = segment_ptr + plane.to(tl.int64) * num_blocks * PLANE + i
    for j in tl.static_range(BLOCKS):
        block = tl.program_id(2) * BLOCKS + j
        is_block = block < num_blocks
        in_cache = cache + tl.load(block_ids_ptr + block, mask=is_block, other=0) * PLANE
        in_segment = segment + block.to(tl.int64) * PLANE
        if PACK:
            words = tl.load(in_cache, mask=mask & is_block, other=0)
            tl.store(in_segment, words, mask=mask & is_block)
        else:
            words = tl.load(in_segment, mask=mask & is_block, other=0)
            tl.store(in_cache, words, mask=mask & is_block)
        # Masked words are zero and add nothing.
        product = words.to(tl.uint32, bitcast=True).to(tl.uint64) * factor
        total = tl.sum(product.to(tl.int64, bitcast=True))
        tl.atomic_add(sums_ptr + block, total, mask=is_block, sem="relaxed")


@triton.jit(do_not_specialize=["num_blocks"])
def finish_fingerprints_kernel(sums_ptr, salts_ptr, num_blocks, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_blocks
    salted = tl.load(sums_ptr + i, mask=mask, other=0) ^ tl.load(salts_ptr + i, mask=mask, other=0)
    fingerprint = splitmix64(salted.to(tl.uint64, bitcast=True))
    tl.store(sums_ptr + i, fingerprint.to(tl.int64, bitcast=True), mask=mask)


def pack(
    kv_cache: torch.Tensor,
    layer_start: int,
    layer_end: int,
    block_ids: torch.Tensor,
    out: torch.Tensor,
    salts: torch.Tensor,
) -> torch.Tensor:
    """Gather `block_ids` of layers [layer_start, layer_end) into `out`; returns the fingerprints, int64 [num_blocks].

    kv_cache: [num_layers, 2, num_cache_blocks, block_size, num_kv_heads, head_dim], contiguous. block_ids, salts: int64
    [num_blocks]. out: uint8, flat, of exactly the segment's bytes, on a multiple of 4. Raises ValueError.
    """
    return _move(kv_cache, layer_start, layer_end, block_ids, out, salts, to_segment=True)


def unpack(
    kv_cache: torch.Tensor,
    layer_start: int,
    layer_end: int,
    block_ids: torch.Tensor,
    data: torch.Tensor,
    salts: torch.Tensor,
) -> torch.Tensor:
    """Scatter `data` into `block_ids` (which must not repeat); returns the fingerprints of what was read.

    The blocks are overwritten whatever the fingerprints turn out to be: on a mismatch they hold nothing of use.
    Arguments as in `pack`. Raises ValueError.
    """
    return _move(kv_cache, layer_start, layer_end, block_ids, data, salts, to_segment=False)


def _move(
    kv_cache: torch.Tensor,
    layer_start: int,
    layer_end: int,
    block_ids: torch.Tensor,
    segment: torch.Tensor,
    salts: torch.Tensor,
    to_segment: bool,
) -> torch.Tensor:
    plane = _check(kv_cache, layer_start, layer_end, block_ids, segment, salts)
    num_blocks = block_ids.shape[0]
    sums = torch.zeros(num_blocks, dtype=torch.int64, device=kv_cache.device)
    if num_blocks == 0:
        return sums
    words = min(_WORDS_PER_PROGRAM, next_power_of_2(plane))
    cache_words = kv_cache.view(kv_cache.shape[0], 2, kv_cache.shape[2], -1).view(torch.int32)
    grid = (cdiv(plane, words), 2 * (layer_end - layer_start), cdiv(num_blocks, _BLOCKS_PER_PROGRAM))
    move_blocks_kernel[grid](
        cache_words,
        segment.view(torch.int32),
        block_ids,
        sums,
        layer_start,
        num_blocks,
        cache_words.stride(0),
        cache_words.stride(1),
        PLANE=plane,
        WORDS=words,
        BLOCKS=_BLOCKS_PER_PROGRAM,
        PACK=to_segment,
        num_warps=4,
    )
    finish_fingerprints_kernel[(cdiv(num_blocks, 256),)](sums, salts, num_blocks, BLOCK=256, num_warps=4)
    return sums


def _check(
    kv_cache: torch.Tensor,
    layer_start: int,
    layer_end: int,
    block_ids: torch.Tensor,
    segment: torch.Tensor,
    salts: torch.Tensor,
) -> int:
    """32-bit words of one block in one K or V plane; ValueError if the arguments do not fit together."""
    if kv_cache.dim() != 6 or kv_cache.shape[1] != 2 or not kv_cache.is_contiguous():
        raise ValueError("kv_cache must be contiguous [layers, 2, blocks, block_size, num_kv_heads, head_dim]")
    if not 0 <= layer_start < layer_end <= kv_cache.shape[0]:
        raise ValueError(f"layers [{layer_start}, {layer_end}) of {kv_cache.shape[0]}")
    num_blocks = block_ids.shape[0]
    if block_ids.dtype != torch.int64 or salts.dtype != torch.int64 or salts.shape != block_ids.shape:
        raise ValueError("block_ids and salts must be int64 and of one length")
    plane_bytes = kv_cache[0, 0, 0].numel() * kv_cache.itemsize
    if plane_bytes % 4:
        raise ValueError(f"a block's {plane_bytes} bytes of K are no multiple of 4")
    expected = 2 * (layer_end - layer_start) * num_blocks * plane_bytes
    if segment.dtype != torch.uint8 or segment.shape != (expected,) or not segment.is_contiguous():
        raise ValueError(f"the segment must be {expected} bytes, got {segment.dtype} {tuple(segment.shape)}")
    if segment.data_ptr() % 4:
        raise ValueError("the segment must start at a multiple of 4 bytes")
    return plane_bytes // 4
