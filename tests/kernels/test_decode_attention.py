"""Split-KV paged decode against float64."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels.decode_attention import decode_attention
from baton.engine.kernels.tuning import DecodeConfig, Tuning
from tests.kernels.reference import REAL_SHAPES, Batch, Shape, assert_close, attention, make_batch

# Up to 6 splits beyond one per sequence, of at least one tile of 16.
SPLIT = DecodeConfig(block_n=16, num_warps=4, num_stages=2, programs=6, min_tiles=1)
WHOLE = DecodeConfig(block_n=32, num_warps=4, num_stages=2, programs=1, min_tiles=64)


def run(batch: Batch, config: DecodeConfig, scale: float = 0.3) -> torch.Tensor:
    out = torch.full_like(batch.q, torch.nan)
    meta = batch.meta
    lens, tables = meta.context_lens, meta.block_tables
    decode_attention(batch.q, batch.layer_kv, out, lens, tables, meta.num_decodes, scale, config)
    return out


@pytest.mark.parametrize(
    ("shape", "decodes", "config"),
    [
        (Shape(2, 2, 32), [1, 64], SPLIT),
        (Shape(2, 2, 32), [1, 64], WHOLE),
        (Shape(3, 1, 48), [16, 17], SPLIT),
        (Shape(3, 1, 48), [16, 17], WHOLE),
        (Shape(4, 1, 64, 32), [31, 33], SPLIT),
        (Shape(8, 1, 16, 64), [64, 2], SPLIT),
        (Shape(9, 3, 24), [15], SPLIT),
    ],
    ids=str,
)
def test_matches_float64(
    shape: Shape, decodes: list[int], config: DecodeConfig, dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch(shape, dtype, device, decodes, [])
    assert_close(run(batch, config), attention(batch, 0.3), dtype)


def test_padded_rows_give_zero(device: torch.device) -> None:
    batch = make_batch(Shape(4, 2, 32), torch.float32, device, [0, 40, 0], [])
    out = run(batch, SPLIT)
    assert (out[0] == 0).all()
    assert (out[2] == 0).all()
    assert_close(out, attention(batch, 0.3), torch.float32)


def test_a_batch_of_padding_gives_zero(device: torch.device) -> None:
    batch = make_batch(Shape(4, 2, 32), torch.float32, device, [0, 0], [])
    assert (run(batch, SPLIT) == 0).all()


def test_one_long_context_among_short_ones(device: torch.device) -> None:
    """The long one takes all splits that the grid leaves; more of them than one merge tile holds."""
    config = DecodeConfig(block_n=16, num_warps=4, num_stages=2, programs=20, min_tiles=1)
    batch = make_batch(Shape(4, 1, 16), torch.float32, device, [1, 300, 3], [])
    assert_close(run(batch, config), attention(batch, 0.3), torch.float32)


@pytest.mark.parametrize("decodes", [[1], [160], [7, 7, 7, 7, 7], [1, 96, 16, 2]])
def test_every_split_fits_into_the_grid(decodes: list[int], device: torch.device) -> None:
    """Whatever the lengths, at most `programs` + one per sequence: a plan that needs more would leave splits out."""
    batch = make_batch(Shape(2, 2, 16), torch.float32, device, decodes, [])
    for programs in (1, 3):
        config = DecodeConfig(block_n=16, num_warps=4, num_stages=2, programs=programs, min_tiles=1)
        assert_close(run(batch, config), attention(batch, 0.3), torch.float32)


def test_leaves_other_rows_alone(device: torch.device) -> None:
    batch = make_batch(Shape(4, 2, 32), torch.float32, device, [9, 3], [(20, 5)])
    out = run(batch, SPLIT)
    assert_close(out[:2], attention(batch, 0.3)[:2], torch.float32)
    assert out[2:].isnan().all()


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    batch = make_batch(Shape(2, 1, 32), torch.float32, device, [50], [])
    assert_close(run(batch, SPLIT, scale=8.0), attention(batch, 8.0), torch.float32, tolerance=5e-4)


def test_an_empty_batch_is_nothing_to_do(device: torch.device) -> None:
    batch = make_batch(Shape(4, 2, 32), torch.float32, device, [], [(4, 4)])
    assert run(batch, SPLIT).isnan().all()


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_tuned_settings_on_real_shapes(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    scale = shape.head_dim**-0.5
    config = Tuning.of(device).decode(shape.head_dim, shape.num_kv_heads, dtype)
    for decodes in ([1, 4097, 64, 0, 65, 2048, 130], [5000], [17] * 150):
        batch = make_batch(shape, dtype, device, decodes, [])
        assert_close(run(batch, config, scale), attention(batch, scale), dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs")
def test_a_captured_graph_follows_new_lengths(device: torch.device) -> None:
    batch = make_batch(Shape(8, 2, 64), torch.float16, device, [900, 30, 0, 1], [])
    config = Tuning.of(device).decode(64, 2, torch.float16)
    meta, lens = batch.meta, batch.meta.context_lens.clone()
    out = torch.zeros_like(batch.q)
    arguments = (batch.q, batch.layer_kv, out, meta.context_lens, meta.block_tables, 4, 0.3, config)
    meta.context_lens.zero_()
    decode_attention(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(*arguments)
    meta.context_lens.copy_(lens)
    graph.replay()
    assert_close(out, attention(batch, 0.3), torch.float16)
