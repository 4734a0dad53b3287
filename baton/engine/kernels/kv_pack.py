"""Gather of KV blocks into a contiguous segment and scatter back, with a 64-bit fingerprint per block on the way.

A segment is [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]. The fingerprint of a block reads its data
of the segment as 32-bit words in the order (layer, K/V, slot, head, dim):
h = sum of word_j * (splitmix64(j) | 1) mod 2^64, fingerprint = splitmix64(h ^ salt). Addition mod 2^64 has no order,
so the atomic sums below give the same bits on every run.

The callers are the transfer threads; everything runs on their current stream, and nothing waits for it here. Each chunk
costs its thread two launches: what they share is in `PackTables`, which serve one chunk after the other.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import (
    NUM_PLANS,
    Launch,
    Signature,
    cdiv,
    is_packed,
    next_power_of_2,
    signature,
)

_WORDS_PER_PROGRAM = 1024
_BLOCKS_TO_FINISH = 256
_BLOCKS_PER_PROGRAM = 8  # also of fewer: a compiled kernel more would cost far more than the masked turns of a loop


@triton.jit
def splitmix64(x):
    z = x + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["num_blocks"])
def move_blocks_kernel(
    kv_ptr,  # int32 words of the cache from the first layer on, [layers, 2, num_cache_blocks, PLANE]
    segment_ptr,  # int32 words of the segment, [num_segment_layers, 2, num_blocks, PLANE]
    block_ids_ptr,
    sums_ptr,  # int64 [num_blocks], zero
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
    cache = kv_ptr + (plane // 2).to(tl.int64) * stride_layer + (plane % 2).to(tl.int64) * stride_plane + i
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
def finish_fingerprints_kernel(sums_ptr, salts_ptr, fingerprints_ptr, num_blocks, BLOCK: tl.constexpr):
    """Also clears the sums for the next chunk."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_blocks
    sums = tl.load(sums_ptr + i, mask=mask, other=0)
    salted = sums ^ tl.load(salts_ptr + i, mask=mask, other=0)
    tl.store(sums_ptr + i, tl.zeros_like(sums), mask=mask)
    fingerprint = splitmix64(salted.to(tl.uint64, bitcast=True))
    tl.store(fingerprints_ptr + i, fingerprint.to(tl.int64, bitcast=True), mask=mask)


class PackTables:
    """What the kernels read and write per block: four int64 tensors of one length, which bounds a chunk's blocks.

    block_ids, salts: filled in before a launch. sums: zero before it and after. fingerprints: the result; may lie in
    pinned memory of the host, which the device writes to. One chunk at a time.
    """

    __slots__ = ("block_ids", "fingerprints", "layout", "salts", "sums")

    def __init__(
        self, block_ids: torch.Tensor, salts: torch.Tensor, sums: torch.Tensor, fingerprints: torch.Tensor
    ) -> None:
        """Raises ValueError."""
        self.block_ids, self.salts, self.sums, self.fingerprints = block_ids, salts, sums, fingerprints
        self.layout = tuple(signature(x) for x in (block_ids, salts, sums, fingerprints))
        for shape, strides, dtype, _ in self.layout:
            if dtype != torch.int64 or len(shape) != 1 or shape != block_ids.shape or not is_packed(shape, strides):
                raise ValueError("all tables must be int64, flat, contiguous and of one length")


def pack(
    kv_cache: torch.Tensor, layer_start: int, layer_end: int, num_blocks: int, tables: PackTables, out: torch.Tensor
) -> None:
    """Gather the first `num_blocks` of the tables' blocks, of layers [layer_start, layer_end), into `out`.

    kv_cache: [num_layers, 2, num_cache_blocks, block_size, num_kv_heads, head_dim], contiguous. out: uint8, flat, of
    exactly the segment's bytes, on a multiple of 4. Raises ValueError.
    """
    _move(kv_cache, layer_start, layer_end, num_blocks, tables, out, True)


def unpack(
    kv_cache: torch.Tensor, layer_start: int, layer_end: int, num_blocks: int, tables: PackTables, data: torch.Tensor
) -> None:
    """Scatter `data` into the blocks, which must not repeat; the fingerprints are those of what was read.

    The blocks are overwritten whatever the fingerprints turn out to be: on a mismatch they hold nothing of use.
    Arguments as in `pack`. Raises ValueError.
    """
    _move(kv_cache, layer_start, layer_end, num_blocks, tables, data, False)


def _move(
    kv_cache: torch.Tensor,
    layer_start: int,
    layer_end: int,
    num_blocks: int,
    tables: PackTables,
    segment: torch.Tensor,
    to_segment: bool,
) -> None:
    if not 0 <= layer_start < layer_end <= kv_cache.shape[0]:
        raise ValueError(f"layers [{layer_start}, {layer_end}) of {kv_cache.shape[0]}")
    if num_blocks > len(tables.block_ids):
        raise ValueError(f"{num_blocks} blocks, tables of {len(tables.block_ids)}")
    if segment.dtype != torch.uint8 or segment.dim() != 1 or not segment.is_contiguous():
        raise ValueError(f"the segment must be flat bytes, got {segment.dtype} {tuple(segment.shape)}")
    address = segment.data_ptr()
    if address % 4:
        raise ValueError("the segment must start at a multiple of 4 bytes")
    cache, num_planes = kv_cache[layer_start:], 2 * (layer_end - layer_start)
    plan = _plan(
        cache.get_device(), signature(kv_cache), cache.data_ptr() & 15, tables.layout, address & 15, to_segment
    )
    expected = num_planes * num_blocks * plan.plane_words * 4
    if len(segment) != expected:
        raise ValueError(f"the segment must be {expected} bytes, got {len(segment)}")
    if num_blocks == 0:
        return
    grid = (plan.programs_per_plane, num_planes, cdiv(num_blocks, _BLOCKS_PER_PROGRAM))
    words = (cache.view(torch.int32), segment.view(torch.int32))
    plan.move.sized(grid, (num_blocks, *plan.strides), *words, tables.block_ids, tables.sums)
    programs = (cdiv(num_blocks, _BLOCKS_TO_FINISH), 1, 1)
    plan.finish.sized(programs, (num_blocks,), tables.sums, tables.salts, tables.fingerprints)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What segments of one cache share, whatever their layers and blocks: chunks come in a thousand sizes.

    `strides`: 32-bit words from layer to layer of the cache, and from its K to its V.
    """

    move: Launch
    finish: Launch
    plane_words: int
    programs_per_plane: int
    strides: tuple[int, int]


@lru_cache(NUM_PLANS)
def _plan(
    device: int, cache: Signature, offset: int, tables: tuple[Signature, ...], segment_offset: int, to_segment: bool
) -> _Plan:
    """The offsets are how far the first layer and the segment are from a multiple of 16 bytes."""
    del device, offset, tables, segment_offset
    shape, strides, dtype, _ = cache
    if len(shape) != 6 or shape[1] != 2 or not is_packed(shape, strides):
        raise ValueError("kv_cache must be contiguous [layers, 2, blocks, block_size, num_kv_heads, head_dim]")
    plane_bytes = shape[3] * shape[4] * shape[5] * dtype.itemsize
    if plane_bytes % 4:
        raise ValueError(f"a block's {plane_bytes} bytes of K are no multiple of 4")
    plane = plane_bytes // 4
    words = min(_WORDS_PER_PROGRAM, next_power_of_2(plane))
    constants = {"PLANE": plane, "WORDS": words, "BLOCKS": _BLOCKS_PER_PROGRAM, "PACK": to_segment}
    return _Plan(
        Launch(move_blocks_kernel, (), (), constants, num_warps=4),
        Launch(finish_fingerprints_kernel, (), (), {"BLOCK": _BLOCKS_TO_FINISH}, num_warps=4),
        plane,
        cdiv(plane, words),
        (2 * shape[2] * plane, shape[2] * plane),
    )
