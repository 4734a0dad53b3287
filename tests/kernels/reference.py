"""float64 references, and batches over a paged cache whose unused slots hold NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baton.engine.attention.base import AttentionMetadata

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> None:
    """`expected` is float64; the tolerance is by default that of values around one in `dtype`."""
    assert actual.isfinite().all()
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16


REAL_SHAPES = [
    Shape(32, 8, 128, 16),
    Shape(32, 8, 128, 64),
    Shape(28, 4, 128, 32),
    Shape(32, 8, 64, 16),
    Shape(24, 24, 96, 32),
    Shape(5, 5, 256, 64),
    Shape(64, 2, 256, 16),
]


@dataclass(frozen=True)
class Batch:
    """Decode rows first. `keys`, `values`: per sequence, [context_len, num_kv_heads, head_dim]."""

    shape: Shape
    meta: AttentionMetadata
    positions: torch.Tensor
    layer_kv: torch.Tensor
    q: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def make_batch(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    decodes: list[int],
    prefills: list[tuple[int, int]],
    store_new: bool = True,
) -> Batch:
    """`decodes`: context lengths (0: padded row). `prefills`: (context length, new tokens).

    The cache holds every sequence's context, without the new tokens unless `store_new`; all else in it is NaN.
    """
    lens = decodes + [context for context, _ in prefills]
    news = [1] * len(decodes) + [new for _, new in prefills]
    size = shape.block_size
    counts = [-(-length // size) for length in lens]
    # Entries past a context name block 0, which no sequence owns.
    free = (torch.randperm(sum(counts) + 3) + 1).tolist()
    tables = torch.zeros(len(lens), max(counts, default=1) + 1, dtype=torch.int32)
    cache = torch.full((2, sum(counts) + 4, size, shape.num_kv_heads, shape.head_dim), torch.nan, dtype=dtype)
    keys, values, slots, positions = [], [], [], []
    for i, (length, new) in enumerate(zip(lens, news, strict=True)):
        blocks = torch.tensor([free.pop() for _ in range(counts[i])], dtype=torch.int64)
        tables[i, : counts[i]] = blocks
        at = torch.arange(length)
        slot = blocks[at // size] * size + at % size if length else torch.tensor([-1])
        k, v = torch.randn(2, length, shape.num_kv_heads, shape.head_dim).to(dtype)
        stored = length if store_new else length - new
        if length:
            cache[0].flatten(0, 1)[slot[:stored]] = k[:stored]
            cache[1].flatten(0, 1)[slot[:stored]] = v[:stored]
        keys.append(k)
        values.append(v)
        slots.append(slot[-new:])
        positions.append(at[-new:] if length else torch.tensor([0]))
    starts = torch.tensor([0, *news]).cumsum(0)
    meta = AttentionMetadata(
        cu_seqlens_q=starts.int().to(device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slot_mapping=torch.cat(slots).to(device),
        max_seqlen_q=max((new for _, new in prefills), default=1),
        num_prefill_tokens=sum(new for _, new in prefills),
        num_prefills=len(prefills),
        num_decodes=len(decodes),
    )
    q = torch.randn(meta.num_tokens, shape.num_heads, shape.head_dim).to(dtype).to(device)
    return Batch(shape, meta, torch.cat(positions).to(device), cache.to(device), q, keys, values)


def attention(batch: Batch, scale: float) -> torch.Tensor:
    """Softmax attention of every new token over its context, float64; zeros for padded rows."""
    out = torch.zeros(batch.q.shape, dtype=torch.float64, device=batch.q.device)
    starts = batch.meta.cu_seqlens_q.tolist()
    group = batch.shape.num_heads // batch.shape.num_kv_heads
    for i, (k, v) in enumerate(zip(batch.keys, batch.values, strict=True)):
        rows = batch.q[starts[i] : starts[i + 1]].double()
        if not len(k):
            continue
        k, v = (x.to(out).repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", rows, k) * scale
        visible = torch.ones(len(rows), len(k), dtype=torch.bool, device=out.device).tril(len(k) - len(rows))
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[starts[i] : starts[i + 1]] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Llama's rotary embedding of x [num_tokens, num_heads, head_dim]; angles [num_tokens, head_dim / 2], float64."""
    half = x.shape[-1] // 2
    as_complex = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = as_complex * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def fingerprint(data: bytes, salt: int) -> int:
    """Of one block's bytes in segment order, in Python integers."""
    total = 0
    for j in range(len(data) // 4):
        total += int.from_bytes(data[4 * j : 4 * j + 4], "little") * (splitmix64(j) | 1)
    return splitmix64((total ^ salt) % 2**64)


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)
