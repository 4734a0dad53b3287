"""The largest logit of every row: what `sampling` draws at temperature 0, in one pass."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import cdiv, next_power_of_2

_TILE = 2048
_TILES_PER_PROGRAM = 2


@triton.jit(do_not_specialize=["stride_logits"])
def greedy_parts_kernel(
    logits_ptr,  # [num_rows, VOCAB_SIZE]
    maxima_ptr,  # float32 [num_rows, num_parts]
    best_token_ptr,  # int32 [num_rows, num_parts]
    stride_logits,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_token = tl.full([TILE], VOCAB_SIZE, tl.int32)
    for i in range(TILES):
        token = (part * TILES + i) * TILE + tl.arange(0, TILE)
        logits = tl.load(logits_row + token, mask=token < VOCAB_SIZE, other=float("-inf")).to(tl.float32)
        # NaN loses every comparison and would go unseen: as infinity it wins, and is refused at the end.
        logits = tl.where(logits == logits, logits, float("inf"))
        better = logits > best  # strictly: the lower id keeps a tie
        best_token = tl.where(better, token, best_token)
        best = tl.where(better, logits, best)
    largest = tl.max(best)
    at = row * tl.num_programs(1) + part
    tl.store(maxima_ptr + at, largest)
    tl.store(best_token_ptr + at, tl.min(tl.where(best == largest, best_token, VOCAB_SIZE)))


@triton.jit
def greedy_winner_kernel(maxima_ptr, best_token_ptr, token_ptr, NUM_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS_PAD)
    maxima = tl.load(maxima_ptr + row * NUM_PARTS + part, mask=part < NUM_PARTS, other=float("-inf"))
    token = tl.load(best_token_ptr + row * NUM_PARTS + part, mask=part < NUM_PARTS, other=0x7FFFFFFF)
    largest = tl.max(maxima)
    winner = tl.min(tl.where(maxima == largest, token, 0x7FFFFFFF))
    tl.store(token_ptr + row, tl.where(tl.abs(largest) < float("inf"), winner, -1).to(tl.int64))


def greedy_tokens(logits: torch.Tensor, out: torch.Tensor) -> None:
    """out[row], int64, becomes the id of the row's largest logit, the lowest of equals; -1 if it is not finite.

    logits: [num_rows, vocab_size], rows contiguous. Legal in a CUDA graph. Raises ValueError.
    """
    num_rows, vocab_size = logits.shape
    if logits.stride(1) != 1 or out.dtype != torch.int64 or out.shape != (num_rows,) or not out.is_contiguous():
        raise ValueError(f"logits need contiguous rows, out must be int64 [{num_rows}], got {out.dtype} {out.shape}")
    if num_rows == 0:
        return
    parts = cdiv(vocab_size, _TILE * _TILES_PER_PROGRAM)
    maxima = torch.empty((num_rows, parts), dtype=torch.float32, device=logits.device)
    best_token = torch.empty((num_rows, parts), dtype=torch.int32, device=logits.device)
    greedy_parts_kernel[(num_rows, parts)](
        logits,
        maxima,
        best_token,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        TILE=_TILE,
        TILES=_TILES_PER_PROGRAM,
        num_warps=4,
    )
    greedy_winner_kernel[(num_rows,)](
        maxima, best_token, out, NUM_PARTS=parts, PARTS_PAD=next_power_of_2(parts), num_warps=1
    )
