"""What a decode step computes on, made on the device from one small record per sequence.

So the host sends four numbers per sequence whatever the context, and a token drawn in one step is the input of the next
without a way over the host.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_TILE = 256


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Buffers of a decode batch; the first rows are used. int64 [max_rows] each, `context_lens` int32.

    `block_tables`: int32 [max_rows, max_blocks].
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor

    @classmethod
    def allocate(cls, max_rows: int, max_blocks: int, device: torch.device) -> DecodeInputs:
        """All zero: padded rows."""
        ids, positions, slots = (torch.zeros(max_rows, dtype=torch.int64, device=device) for _ in range(3))
        context_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        tables = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        return cls(ids, positions, slots, context_lens, tables)


@triton.jit(do_not_specialize=["num_rows"])
def decode_inputs_kernel(
    records_ptr,  # int64 [4, num_rows]: table row, context length (0: padding), token, row among the draws or -1
    tables_ptr,  # int32 [max_seqs, MAX_BLOCKS]
    draws_ptr,  # int64
    input_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    context_lens_ptr,
    block_tables_ptr,  # int32 [num_rows, MAX_BLOCKS]
    num_rows,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    table = tables_ptr + tl.load(records_ptr + row) * MAX_BLOCKS
    context_len = tl.load(records_ptr + num_rows + row)
    token = tl.load(records_ptr + 2 * num_rows + row)
    draw = tl.load(records_ptr + 3 * num_rows + row)
    # A draw from logits that were not finite is negative; its sequence ends, but this step must not read outside.
    drawn = tl.maximum(tl.load(draws_ptr + tl.maximum(draw, 0)), 0)
    position = tl.maximum(context_len - 1, 0)
    block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
    tl.store(input_ids_ptr + row, tl.where(draw >= 0, drawn, token))
    tl.store(positions_ptr + row, position)
    tl.store(slot_mapping_ptr + row, tl.where(context_len > 0, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    tl.store(context_lens_ptr + row, context_len.to(tl.int32))
    num_blocks = (context_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    out = block_tables_ptr + row.to(tl.int64) * MAX_BLOCKS
    for start in range(0, num_blocks, TILE):
        i = start + tl.arange(0, TILE)
        tl.store(out + i, tl.load(table + i, mask=i < num_blocks, other=0), mask=i < num_blocks)


def decode_inputs(
    records: torch.Tensor, tables: torch.Tensor, draws: torch.Tensor, out: DecodeInputs, block_size: int
) -> None:
    """Fill the first rows of `out` from `records`, int64 [4, num_rows]. Legal in a CUDA graph. Raises ValueError.

    A record: row of `tables` (int32 [max_seqs, max_blocks]), context length including the new token (0: a padded row),
    the token, and the row of `draws` (int64) that holds the token instead, or -1.
    """
    num_rows, max_blocks = records.shape[1], tables.shape[1]
    if records.shape[0] != 4 or records.dtype != torch.int64 or not records.is_contiguous():
        raise ValueError(f"records must be contiguous int64 [4, num_rows], got {records.dtype} {tuple(records.shape)}")
    if out.block_tables.shape[1] != max_blocks or num_rows > out.block_tables.shape[0] or not tables.is_contiguous():
        raise ValueError(f"{num_rows} rows of {max_blocks} blocks do not fit {tuple(out.block_tables.shape)}")
    if num_rows == 0:
        return
    decode_inputs_kernel[(num_rows,)](
        records,
        tables,
        draws,
        out.input_ids,
        out.positions,
        out.slot_mapping,
        out.context_lens,
        out.block_tables,
        num_rows,
        MAX_BLOCKS=max_blocks,
        BLOCK_SIZE=block_size,
        TILE=_TILE,
        num_warps=2,
    )
