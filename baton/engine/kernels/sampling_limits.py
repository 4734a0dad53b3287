"""What top-k, top-p and min-p leave of a row, without sorting it.

Tokens are ranked by (max - logit) / temperature, a float32 that is never negative, so its bits keep its order: a
search over them finds the limit that as many tokens, or as much probability, lie within. Each pass tries seven limits:
the first one powers of two, between which distances lie, every later one what cuts the range into eighths. A pass that
meets few tokens in its range lists them, and the rest of the search reads the list instead of the row. Of the tokens
exactly at the limit the lower ids stay. Min-p is such a limit from the start.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)  # the bits of it
OCTAVE = tl.constexpr(1 << 23)  # from the bits of a number to those of its double
QUARTER = tl.constexpr(0x3E800000)  # the bits of 0.25: the first limits tried are 1/2, 1, 2, .. 32


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
def _tokens(list_row, start, size, listed, VOCAB_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Ids from the list, or, where there is none yet, all of the row; ascending, VOCAB_SIZE or more past the end."""
    token = start + tl.arange(0, TILE)
    if listed > 0:
        token = tl.load(list_row + token, mask=token < size, other=VOCAB_SIZE)
    return token


@triton.jit
def _pass(
    logits_row,
    list_row,
    row_max,
    temperature,
    low,
    high,
    edge,
    first,
    step,
    seventh,
    listed,
    size,
    VOCAB_SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """Weights of the tokens from `low` to below first + step, .. first + 6 * step, first + seventh.

    A token at or beyond `edge` weighs nothing. Then `listed` and `size` of the list as this pass leaves it: where there
    was none it holds all tokens from `low` to `high`, if they are few enough. float64 by mass, int32 by count.
    """
    nothing = tl.zeros([TILE], tl.float64 if BY_MASS else tl.int32)
    t1, t2, t3, t4, t5, t6, t7 = nothing, nothing, nothing, nothing, nothing, nothing, nothing
    found = size * 0
    for start in range(0, size, TILE):
        token = _tokens(list_row, start, size, listed, VOCAB_SIZE, TILE)
        distance = load_distances(logits_row, token, row_max, temperature, VOCAB_SIZE)
        bits = distance.to(tl.int32, bitcast=True)
        inside = (token < VOCAB_SIZE) & (bits >= low) & (bits <= high)
        if (listed == 0) & (found <= CAPACITY):
            is_inside = inside.to(tl.int32)
            place = found + tl.cumsum(is_inside) - 1
            tl.store(list_row + place, token, mask=inside & (place < CAPACITY))
            found += tl.sum(is_inside)
        weight = tl.exp(-distance).to(tl.float64) if BY_MASS else tl.full([TILE], 1, tl.int32)
        weight = tl.where(inside & (bits < edge), weight, nothing)
        # From where the limits begin, so that none of them overflows.
        bits -= first
        t1 += tl.where(bits < step, weight, nothing)
        t2 += tl.where(bits < 2 * step, weight, nothing)
        t3 += tl.where(bits < 3 * step, weight, nothing)
        t4 += tl.where(bits < 4 * step, weight, nothing)
        t5 += tl.where(bits < 5 * step, weight, nothing)
        t6 += tl.where(bits < 6 * step, weight, nothing)
        t7 += tl.where(bits < seventh, weight, nothing)
    # The next pass reads what other threads have listed here, or lists anew where they have read or listed here.
    tl.debug_barrier()
    if (listed == 0) & (found <= CAPACITY):
        listed = listed + 1
        size = found
    return (
        tl.sum(t1),
        tl.sum(t2),
        tl.sum(t3),
        tl.sum(t4),
        tl.sum(t5),
        tl.sum(t6),
        tl.sum(t7),
        listed,
        size,
    )


@triton.jit
def _search(
    logits_row,
    list_row,
    row_max,
    temperature,
    edge,
    kept,
    share,
    VOCAB_SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """The smallest limit within which there is enough, at most `edge`; the weight nearer than it; what is enough.

    By count, `kept` tokens are enough; by mass, `share` of what is nearer than `edge` and of `kept` tokens at it. Also
    `listed` and `size`: the list, where there is one, holds all tokens at the limit.
    """
    low, high, listed, size = edge * 0, edge, edge * 0, edge * 0 + VOCAB_SIZE
    first, step, seventh = low + QUARTER, low + OCTAVE, edge - QUARTER
    at_edge = tl.exp(-edge.to(tl.float32, bitcast=True)).to(tl.float64) * kept
    below = at_edge * 0.0 if BY_MASS else kept * 0
    enough = below + kept
    num_passes = low
    while (num_passes == 0) | (low < high):
        w1, w2, w3, w4, w5, w6, w7, listed, size = _pass(
            logits_row,
            list_row,
            row_max,
            temperature,
            low,
            high,
            edge,
            first,
            step,
            seventh,
            listed,
            size,
            VOCAB_SIZE,
            CAPACITY,
            TILE,
            BY_MASS,
        )
        if BY_MASS:
            enough = tl.where(num_passes == 0, (w7 + at_edge) * share, enough)
        missing = enough - below
        num_short = (w1 < missing).to(tl.int32) + (w2 < missing).to(tl.int32) + (w3 < missing).to(tl.int32)
        num_short += (w4 < missing).to(tl.int32) + (w5 < missing).to(tl.int32) + (w6 < missing).to(tl.int32)
        num_short += (w7 < missing).to(tl.int32)
        # The weight within the last limit that leaves too little.
        gained = tl.where(w1 < missing, w1, below * 0)
        gained = tl.where(w2 < missing, w2, gained)
        gained = tl.where(w3 < missing, w3, gained)
        gained = tl.where(w4 < missing, w4, gained)
        gained = tl.where(w5 < missing, w5, gained)
        gained = tl.where(w6 < missing, w6, gained)
        below += tl.where(w7 < missing, w7, gained)
        begin = first + tl.where(num_short < 7, num_short * step, seventh)
        end = tl.where(num_short < 6, begin + step, tl.where(num_short < 7, first + seventh, high + 1))
        low = tl.where(num_short > 0, tl.minimum(begin, high), low)
        high = tl.minimum(end - 1, high)
        step = (high - low) // 8 + 1
        first, seventh = low, 7 * step
        num_passes += 1
    return low, below, enough, listed, size


@triton.jit
def _last_kept(
    logits_row,
    list_row,
    row_max,
    temperature,
    limit,
    ties,
    listed,
    size,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Id of the `ties`-th token at the limit, in order of ids."""
    seen = ties * 0
    result = tl.full([TILE], VOCAB_SIZE, tl.int32)
    for start in range(0, size, TILE):
        token = _tokens(list_row, start, size, listed, VOCAB_SIZE, TILE)
        distance = load_distances(logits_row, token, row_max, temperature, VOCAB_SIZE)
        at_limit = (distance.to(tl.int32, bitcast=True) == limit).to(tl.int32)
        is_last = (at_limit == 1) & (seen + tl.cumsum(at_limit) == ties)
        result = tl.where(is_last, token, result)
        seen += tl.sum(at_limit)
    return tl.min(result)


@triton.jit(do_not_specialize=["stride_logits", "stride_list"])
def limits_kernel(
    logits_ptr,
    maxima_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    max_distance_ptr,
    limit_ptr,  # int32 [num_rows]: tokens stay whose distance's bits are smaller than this
    last_token_ptr,  # int32 [num_rows]: tokens at the limit stay up to this id
    list_ptr,  # int32 [num_rows, CAPACITY]: room for ids
    stride_logits,
    stride_list,
    VOCAB_SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits
    list_row = list_ptr + row.to(tl.int64) * stride_list
    row_max = load_row_max(maxima_ptr + row * NUM_PARTS, NUM_PARTS, PARTS_PAD)
    is_drawn = tl.load(temperature_ptr + row) > 0.0
    temperature = load_temperature(temperature_ptr, row)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    top_p = tl.load(top_p_ptr + row).to(tl.float64)
    by_count = (top_k > 0) & (top_k < VOCAB_SIZE)
    by_mass = top_p < 1.0
    limit = top_k * 0 + INFINITY
    last_token = top_k * 0 + VOCAB_SIZE
    if is_drawn & (by_count | by_mass) & (tl.abs(row_max) < float("inf")):
        ties, listed, size = last_token, top_k * 0, last_token
        if by_count:
            limit, nearer, _, listed, size = _search(
                logits_row, list_row, row_max, temperature, limit, top_k, top_p, VOCAB_SIZE, CAPACITY, TILE, False
            )
            ties = top_k - nearer
        if by_mass:
            edge = limit
            limit, nearer, wanted, listed, size = _search(
                logits_row, list_row, row_max, temperature, edge, ties, top_p, VOCAB_SIZE, CAPACITY, TILE, True
            )
            ties = tl.where(limit < edge, last_token, ties)
            # A token stays while the mass before it is below the wanted one; `each` is positive here.
            each = tl.exp(-limit.to(tl.float32, bitcast=True)).to(tl.float64)
            needed = tl.minimum(tl.ceil((wanted - nearer) / each), ties.to(tl.float64))
            ties = tl.maximum(needed.to(tl.int32), 1)
        last_token = _last_kept(logits_row, list_row, row_max, temperature, limit, ties, listed, size, VOCAB_SIZE, TILE)
    max_distance = tl.load(max_distance_ptr + row).to(tl.int32, bitcast=True)
    if max_distance < limit:
        limit = max_distance
        last_token = top_k * 0 + VOCAB_SIZE
    tl.store(limit_ptr + row, limit)
    tl.store(last_token_ptr + row, last_token)
