"""What top-k, top-p and min-p leave of a row, without sorting it.

Tokens are ranked by (max - logit) / temperature, a float32 that is never negative, so its bits keep its order: a
search over them finds the limit that as many tokens, or as much probability, lie within. Each pass over the row tries
seven limits and leaves an eighth of the range. Of the tokens exactly at the limit the lower ids stay. Min-p is such a
limit from the start.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_distances(logits_row, token, row_max, temperature, VOCAB_SIZE: tl.constexpr):
    """(max - logit) / temperature in float32, infinite past the end. Never negative: its bits keep its order."""
    logits = tl.load(logits_row + token, mask=token < VOCAB_SIZE, other=float("-inf")).to(tl.float32)
    # Correctly rounded, as in the reference: both must see the same ties.
    return tl.math.div_rn(row_max - logits, temperature + tl.zeros_like(logits))


@triton.jit
def load_row_max(maxima_row, NUM_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr):
    part = tl.arange(0, PARTS_PAD)
    row_max = tl.max(tl.load(maxima_row + part, mask=part < NUM_PARTS, other=float("-inf")))
    return row_max + 0.0  # not -0.0, from which a 0.0 would be at a distance of -0.0


@triton.jit
def load_temperature(temperature_ptr, row):
    """What to divide by: 1 for a greedy row, and nothing so small that it would be flushed to zero."""
    temperature = tl.load(temperature_ptr + row)
    return tl.where(temperature > 0.0, tl.maximum(temperature, 1e-6), 1.0)


@triton.jit
def _weight_within(
    logits_row, row_max, temperature, limit, VOCAB_SIZE: tl.constexpr, TILE: tl.constexpr, BY_MASS: tl.constexpr
):
    """Number, or unnormalised probability, of the tokens whose distance's bits are at most `limit`; float64."""
    total = tl.zeros([TILE], tl.float64)
    for start in range(0, VOCAB_SIZE, TILE):
        token = start + tl.arange(0, TILE)
        distance = load_distances(logits_row, token, row_max, temperature, VOCAB_SIZE)
        within = (distance.to(tl.int32, bitcast=True) <= limit) & (token < VOCAB_SIZE)
        weight = tl.exp(-distance) if BY_MASS else tl.full([TILE], 1.0, tl.float32)
        total += tl.where(within, weight, 0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _within(weight, bits, limit):
    return tl.where(bits <= limit, weight, 0.0)


@triton.jit
def _search(
    logits_row,
    row_max,
    temperature,
    target,
    high,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """The smallest limit, at most `high`, within which the weight is at least `target`."""
    low = high * 0
    while low < high:
        step = (high - low) // 8 + 1
        t1 = tl.zeros([TILE], tl.float64)
        t2, t3, t4, t5, t6, t7 = t1, t1, t1, t1, t1, t1
        for start in range(0, VOCAB_SIZE, TILE):
            token = start + tl.arange(0, TILE)
            distance = load_distances(logits_row, token, row_max, temperature, VOCAB_SIZE)
            weight = tl.exp(-distance) if BY_MASS else tl.full([TILE], 1.0, tl.float32)
            weight = tl.where(token < VOCAB_SIZE, weight, 0.0).to(tl.float64)
            # From where the range begins, so that no sum of a limit overflows.
            bits = distance.to(tl.int32, bitcast=True) - low
            t1 += _within(weight, bits, step - 1)
            t2 += _within(weight, bits, 2 * step - 1)
            t3 += _within(weight, bits, 3 * step - 1)
            t4 += _within(weight, bits, 4 * step - 1)
            t5 += _within(weight, bits, 5 * step - 1)
            t6 += _within(weight, bits, 6 * step - 1)
            t7 += _within(weight, bits, 7 * step - 1)
        too_little = (tl.sum(t1) < target).to(tl.int32) + (tl.sum(t2) < target).to(tl.int32)
        too_little += (tl.sum(t3) < target).to(tl.int32) + (tl.sum(t4) < target).to(tl.int32)
        too_little += (tl.sum(t5) < target).to(tl.int32) + (tl.sum(t6) < target).to(tl.int32)
        too_little += (tl.sum(t7) < target).to(tl.int32)
        low = tl.minimum(low + too_little * step, high)
        high = tl.minimum(low + (step - 1), high)
    return low


@triton.jit
def _last_kept(logits_row, row_max, temperature, limit, ties, VOCAB_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Id of the `ties`-th token at the limit, in order of ids."""
    seen = ties * 0
    result = tl.full([TILE], VOCAB_SIZE, tl.int32)
    for start in range(0, VOCAB_SIZE, TILE):
        token = start + tl.arange(0, TILE)
        distance = load_distances(logits_row, token, row_max, temperature, VOCAB_SIZE)
        at_limit = (distance.to(tl.int32, bitcast=True) == limit).to(tl.int32)
        is_last = (at_limit == 1) & (seen + tl.cumsum(at_limit) == ties)
        result = tl.where(is_last, token, result)
        seen += tl.sum(at_limit)
    return tl.min(result)


@triton.jit(do_not_specialize=["stride_logits"])
def limits_kernel(
    logits_ptr,
    maxima_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    max_distance_ptr,
    limit_ptr,  # int32 [num_rows]: tokens stay whose distance's bits are smaller than this
    last_token_ptr,  # int32 [num_rows]: tokens at the limit stay up to this id
    stride_logits,
    VOCAB_SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits
    row_max = load_row_max(maxima_ptr + row * NUM_PARTS, NUM_PARTS, PARTS_PAD)
    is_drawn = tl.load(temperature_ptr + row) > 0.0
    temperature = load_temperature(temperature_ptr, row)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    top_p = tl.load(top_p_ptr + row).to(tl.float64)
    by_count = (top_k > 0) & (top_k < VOCAB_SIZE)
    by_mass = top_p < 1.0
    limit = top_k * 0 + 0x7F800000  # the bits of infinity
    last_token = top_k * 0 + VOCAB_SIZE
    if is_drawn & (by_count | by_mass) & (tl.abs(row_max) < float("inf")):
        ties = last_token
        if by_count:
            limit = _search(logits_row, row_max, temperature, top_k.to(tl.float64), limit, VOCAB_SIZE, TILE, False)
            nearer = _weight_within(logits_row, row_max, temperature, limit - 1, VOCAB_SIZE, TILE, False)
            ties = top_k - nearer.to(tl.int32)
        if by_mass:
            nearer = _weight_within(logits_row, row_max, temperature, limit - 1, VOCAB_SIZE, TILE, True)
            each = tl.exp(-limit.to(tl.float32, bitcast=True)).to(tl.float64)
            wanted = (nearer + ties * each) * top_p
            if nearer >= wanted:
                limit = _search(logits_row, row_max, temperature, wanted, limit - 1, VOCAB_SIZE, TILE, True)
                nearer = _weight_within(logits_row, row_max, temperature, limit - 1, VOCAB_SIZE, TILE, True)
                each = tl.exp(-limit.to(tl.float32, bitcast=True)).to(tl.float64)
                ties = last_token
            # A token stays while the mass before it is below the wanted one; `each` is positive here.
            needed = tl.minimum(tl.ceil((wanted - nearer) / each), ties.to(tl.float64))
            ties = tl.maximum(needed.to(tl.int32), 1)
        last_token = _last_kept(logits_row, row_max, temperature, limit, ties, VOCAB_SIZE, TILE)
    max_distance = tl.load(max_distance_ptr + row).to(tl.int32, bitcast=True)
    if max_distance < limit:
        limit = max_distance
        last_token = top_k * 0 + VOCAB_SIZE
    tl.store(limit_ptr + row, limit)
    tl.store(last_token_ptr + row, last_token)
