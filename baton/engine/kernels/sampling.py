"""Sampling without a softmax over, or a sort of, the vocabulary. Draws what `baton.engine.sampler` defines.

A row's token is the winner of a Gumbel race: (logit - max) / temperature - log(-log(u)), u from Philox4x32-10 with the
seed as key and counter (token id, position, choice, 0). Top-k, top-p and min-p become one limit: see `sampling_limits`.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.engine.kernels.launch import cdiv, next_power_of_2
from baton.engine.kernels.sampling_limits import limits_kernel, load_distances, load_row_max, load_temperature

TILE = 1024
LIMIT_TILE = 2048
LIMIT_WARPS = 16
TILES_PER_PROGRAM = 4


@triton.jit
def philox_first_word(counter0, counter1, counter2, key0, key1):
    """The first output word of Philox4x32-10 with counter (counter0, counter1, counter2, 0); uint64 holding 32 bits."""
    c0, c1, c2 = counter0, counter1, counter2
    c3 = tl.zeros_like(counter0)
    for _ in tl.static_range(10):
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0 = (product1 >> 32) ^ c1 ^ key0
        c1 = product1 & 0xFFFFFFFF
        c2 = (product0 >> 32) ^ c3 ^ key1
        c3 = product0 & 0xFFFFFFFF
        key0 = (key0 + 0x9E3779B9) & 0xFFFFFFFF
        key1 = (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


@triton.jit(do_not_specialize=["stride_logits"])
def row_max_kernel(
    logits_ptr,  # [num_rows, VOCAB_SIZE]
    maxima_ptr,  # float32 [num_rows, num_parts]
    stride_logits,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0)
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits
    best = tl.full([TILE], float("-inf"), tl.float32)
    for i in range(TILES):
        token = (tl.program_id(1) * TILES + i) * TILE + tl.arange(0, TILE)
        logits = tl.load(logits_row + token, mask=token < VOCAB_SIZE, other=float("-inf")).to(tl.float32)
        # NaN loses every comparison and would go unseen: as infinity it wins, and is refused at the end.
        best = tl.maximum(best, tl.where(logits == logits, logits, float("inf")))
    tl.store(maxima_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.max(best))


@triton.jit(do_not_specialize=["stride_logits"])
def race_kernel(
    logits_ptr,
    maxima_ptr,
    temperature_ptr,
    limit_ptr,
    last_token_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    best_value_ptr,  # float64 [num_rows, NUM_PARTS]
    best_token_ptr,  # int32 [num_rows, NUM_PARTS]
    stride_logits,
    VOCAB_SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits
    row_max = load_row_max(maxima_ptr + row * NUM_PARTS, NUM_PARTS, PARTS_PAD)
    is_drawn = tl.load(temperature_ptr + row) > 0.0
    temperature = load_temperature(temperature_ptr, row)
    limit = tl.load(limit_ptr + row)
    last_token = tl.load(last_token_ptr + row)
    seed = tl.load(seed_ptr + row).to(tl.uint64, bitcast=True)
    position = tl.load(position_ptr + row).to(tl.uint64)
    choice = tl.load(choice_ptr + row).to(tl.uint64)
    best_value = tl.full([TILE], float("-inf"), tl.float64)
    best_token = tl.full([TILE], VOCAB_SIZE, tl.int32)
    for i in range(TILES):
        token = (part * TILES + i) * TILE + tl.arange(0, TILE)
        distance = load_distances(logits_row, token, row_max, temperature, VOCAB_SIZE)
        bits = distance.to(tl.int32, bitcast=True)
        value = -distance.to(tl.float64)
        if is_drawn:
            word = philox_first_word(token.to(tl.uint64), position, choice, seed & 0xFFFFFFFF, seed >> 32)
            # float64: in float32 the largest u would round to 1 and win every race.
            u = ((word >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08
            value -= tl.log(-tl.log(u))
        value = tl.where((bits < limit) | ((bits == limit) & (token <= last_token)), value, float("-inf"))
        better = value > best_value  # strictly: the lower id keeps a tie
        best_token = tl.where(better, token, best_token)
        best_value = tl.where(better, value, best_value)
    winner = tl.max(best_value)
    tl.store(best_value_ptr + row * NUM_PARTS + part, winner)
    tl.store(best_token_ptr + row * NUM_PARTS + part, tl.min(tl.where(best_value == winner, best_token, VOCAB_SIZE)))


@triton.jit
def winner_kernel(
    maxima_ptr, best_value_ptr, best_token_ptr, token_ptr, NUM_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr
):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS_PAD)
    row_max = load_row_max(maxima_ptr + row * NUM_PARTS, NUM_PARTS, PARTS_PAD)
    value = tl.load(best_value_ptr + row * NUM_PARTS + part, mask=part < NUM_PARTS, other=float("-inf"))
    token = tl.load(best_token_ptr + row * NUM_PARTS + part, mask=part < NUM_PARTS, other=0x7FFFFFFF)
    winner = tl.min(tl.where(value == tl.max(value), token, 0x7FFFFFFF))
    tl.store(token_ptr + row, tl.where(tl.abs(row_max) < float("inf"), winner, -1).to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    max_distance: torch.Tensor,
    seed: torch.Tensor,
    choice: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """One token per row: int64 [num_rows], -1 where the logits have no finite maximum. Legal in a CUDA graph.

    logits: [num_rows, vocab_size]. Per row: temperature, top_p, max_distance float32 (temperature 0 is greedy, top_p 1
    is off; min-p as `baton.engine.sampler.max_distance`, infinity is off); top_k (below 1, or not below the
    vocabulary's size: off), seed (the bits of an unsigned one), choice, position int64; the position is that of the
    drawn token in the sequence. Raises ValueError.
    """
    _check(logits, (temperature, top_p, max_distance), (top_k, seed, choice, position))
    num_rows, vocab_size = logits.shape
    device = logits.device
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return tokens
    parts = cdiv(vocab_size, TILE * TILES_PER_PROGRAM)
    parts_pad = next_power_of_2(parts)
    maxima = torch.empty((num_rows, parts), dtype=torch.float32, device=device)
    best_value = torch.empty((num_rows, parts), dtype=torch.float64, device=device)
    best_token = torch.empty((num_rows, parts), dtype=torch.int32, device=device)
    limit, last_token = torch.empty((2, num_rows), dtype=torch.int32, device=device)
    stride, size = logits.stride(0), {"NUM_PARTS": parts, "PARTS_PAD": parts_pad}
    tiles = {"VOCAB_SIZE": vocab_size, "TILE": TILE, "TILES": TILES_PER_PROGRAM}
    row_max_kernel[(num_rows, parts)](logits, maxima, stride, **tiles)
    limits_kernel[(num_rows,)](
        logits,
        maxima,
        temperature,
        top_k,
        top_p,
        max_distance,
        limit,
        last_token,
        stride,
        vocab_size,
        TILE=LIMIT_TILE,
        **size,
        num_warps=LIMIT_WARPS,
    )
    race_kernel[(num_rows, parts)](
        logits,
        maxima,
        temperature,
        limit,
        last_token,
        seed,
        choice,
        position,
        best_value,
        best_token,
        stride,
        **tiles,
        **size,
    )
    winner_kernel[(num_rows,)](maxima, best_value, best_token, tokens, **size, num_warps=1)
    return tokens


def _check(logits: torch.Tensor, floats: tuple[torch.Tensor, ...], integers: tuple[torch.Tensor, ...]) -> None:
    num_rows = logits.shape[0]
    if logits.stride(1) != 1:
        raise ValueError("rows of logits must be contiguous")
    if any(x.shape != (num_rows,) or x.dtype != torch.float32 for x in floats):
        raise ValueError(f"temperature, top_p and max_distance must be float32 [{num_rows}]")
    if any(x.shape != (num_rows,) or x.dtype != torch.int64 for x in integers):
        raise ValueError(f"top_k, seed, choice and position must be int64 [{num_rows}]")
