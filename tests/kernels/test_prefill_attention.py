"""Paged causal prefill against float64."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels.prefill_attention import prefill_attention
from baton.engine.kernels.tuning import PrefillConfig, Tuning
from tests.kernels.reference import REAL_SHAPES, Batch, Shape, assert_close, attention, make_batch

SMALL = PrefillConfig(block_m=16, block_n=32, num_warps=4, num_stages=2)


def run(batch: Batch, config: PrefillConfig, scale: float = 0.3) -> torch.Tensor:
    out = torch.full_like(batch.q, torch.nan)
    meta = batch.meta
    prefill_attention(
        batch.q,
        batch.layer_kv,
        out,
        meta.cu_seqlens_q,
        meta.context_lens,
        meta.block_tables,
        meta.num_decodes,
        meta.max_seqlen_q,
        scale,
        config,
    )
    return out


@pytest.mark.parametrize(
    ("shape", "prefills"),
    [
        (Shape(2, 2, 32), [(1, 1), (16, 16)]),
        (Shape(3, 1, 32), [(17, 17), (33, 1)]),
        (Shape(4, 1, 64, 32), [(40, 9), (32, 32)]),
        (Shape(8, 1, 16), [(48, 16), (47, 15)]),
        (Shape(6, 2, 48, 64), [(64, 3), (5, 5)]),
        (Shape(9, 3, 24), [(34, 2)]),
        (Shape(20, 1, 16), [(18, 3)]),
    ],
    ids=["mha", "gqa3", "gqa4-block32", "gqa8-prefix", "head48-block64", "head24-odd", "group above block_m"],
)
def test_matches_float64(
    shape: Shape, prefills: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch(shape, dtype, device, [], prefills)
    assert_close(run(batch, SMALL), attention(batch, 0.3), dtype)


@pytest.mark.parametrize("block_size", [16, 64])
def test_tiles_smaller_and_larger_than_a_block(block_size: int, device: torch.device) -> None:
    batch = make_batch(Shape(4, 2, 32, block_size), torch.float32, device, [], [(61, 21)])
    for block_n in (16, 64):
        out = run(batch, PrefillConfig(block_m=32, block_n=block_n, num_warps=4, num_stages=2))
        assert_close(out, attention(batch, 0.3), torch.float32)


def test_writes_only_the_rows_of_its_sequences(device: torch.device) -> None:
    batch = make_batch(Shape(4, 2, 32), torch.float32, device, [9, 3], [(20, 5)])
    out = run(batch, SMALL)
    assert out[:2].isnan().all()
    assert_close(out[2:], attention(batch, 0.3)[2:], torch.float32)


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    batch = make_batch(Shape(2, 1, 32), torch.float32, device, [], [(20, 20)])
    assert_close(run(batch, SMALL, scale=8.0), attention(batch, 8.0), torch.float32, tolerance=5e-4)


def test_reads_strided_queries(device: torch.device) -> None:
    batch = make_batch(Shape(4, 2, 32), torch.float32, device, [], [(20, 7)])
    fused = torch.full((7, 10, 32), torch.nan, device=device)
    fused[:, 2:6] = batch.q
    strided = Batch(**{**batch.__dict__, "q": fused[:, 2:6]})
    out = torch.full_like(batch.q, torch.nan)
    meta = batch.meta
    prefill_attention(
        strided.q, batch.layer_kv, out, meta.cu_seqlens_q, meta.context_lens, meta.block_tables, 0, 7, 0.3, SMALL
    )
    assert_close(out, attention(batch, 0.3), torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_tuned_settings_on_real_shapes(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    scale = shape.head_dim**-0.5
    prefills = [(1, 1), (2000, 700), (513, 513), (128, 128), (1025, 1), (640, 64)]
    batch = make_batch(shape, dtype, device, [5, 700], prefills)
    out = run(batch, Tuning.of(device).prefill(shape.head_dim, dtype), scale)
    assert_close(out[2:], attention(batch, scale)[2:], dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale must be positive"),
        ({"q": torch.zeros(7, 3, 32)}, "does not fit"),
        ({"q": torch.zeros(7, 4, 32, dtype=torch.float16)}, "the cache is"),
        ({"out": torch.zeros(7, 4, 64)[:, :, ::2]}, "contiguous"),
        ({"layer_kv": torch.zeros(2, 3, 12, 2, 32)}, "block_size"),
    ],
)
def test_refuses_what_it_would_misread(change: dict[str, object], message: str) -> None:
    batch = make_batch(Shape(4, 2, 32), torch.float32, torch.device("cpu"), [], [(7, 7)])
    meta = batch.meta
    arguments = {
        "q": batch.q,
        "layer_kv": batch.layer_kv,
        "out": torch.zeros_like(batch.q),
        "cu_seqlens_q": meta.cu_seqlens_q,
        "context_lens": meta.context_lens,
        "block_tables": meta.block_tables,
        "first_seq": 0,
        "max_seqlen_q": 7,
        "scale": 0.3,
        "config": SMALL,
    }
    with pytest.raises(ValueError, match=message):
        prefill_attention(**{**arguments, **change})  # type: ignore[arg-type]
