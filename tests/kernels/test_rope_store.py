"""Fused rotary embedding and KV store, kernel and torch backend alike, against float64."""

from __future__ import annotations

import pytest
import torch

from baton.engine.attention.base import AttentionBackend
from baton.engine.attention.torch_reference import TorchBackend
from baton.engine.attention.triton_backend import TritonBackend
from tests.kernels.reference import Shape, assert_close, make_batch, rotate


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> AttentionBackend:
    return TorchBackend() if request.param == "torch" else TritonBackend(device)


@pytest.mark.parametrize(
    "shape", [Shape(4, 2, 32), Shape(3, 1, 48, 32), Shape(20, 5, 16, 64)], ids=["pow2", "head48", "two-tiles"]
)
def test_rotates_in_place_and_stores(
    shape: Shape, backend: AttentionBackend, dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch(shape, dtype, device, [5, 0, 17], [(20, 4), (16, 3)], store_new=False)
    n, heads, kv_heads = batch.meta.num_tokens, shape.num_heads, shape.num_kv_heads
    # One fused product, as the projections leave it: rows of q, k and v are views of it.
    fused = torch.randn(n, heads + 2 * kv_heads, shape.head_dim).to(dtype).to(device)
    q, k, v = fused[:, :heads], fused[:, heads:-kv_heads], fused[:, -kv_heads:]
    angles = torch.rand(64, shape.head_dim // 2, dtype=torch.float64, device=device) * 7
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
    expected_q, expected_k = (rotate(x, angles[batch.positions]) for x in (q, k))
    expected_v = v.clone()
    before = batch.layer_kv.clone()

    backend.rope_and_store(q, k, v, batch.positions, table, batch.layer_kv, batch.meta)

    assert_close(q, expected_q, dtype)
    assert_close(k, expected_k, dtype)
    assert torch.equal(v, expected_v)
    slots = batch.meta.slot_mapping
    stored = slots >= 0
    cached = batch.layer_kv.flatten(1, 2)
    assert torch.equal(cached[0][slots[stored]], k[stored])
    assert torch.equal(cached[1][slots[stored]], v[stored])
    untouched = torch.ones(cached.shape[1], dtype=torch.bool, device=device)
    untouched[slots[stored]] = False
    torch.testing.assert_close(cached[:, untouched], before.flatten(1, 2)[:, untouched], equal_nan=True, rtol=0, atol=0)


def test_no_tokens(backend: AttentionBackend, device: torch.device) -> None:
    shape = Shape(4, 2, 32)
    batch = make_batch(shape, torch.float32, device, [], [(16, 0)])
    q, kv = torch.zeros(0, 4, 32, device=device), torch.zeros(0, 2, 32, device=device)
    before = batch.layer_kv.clone()
    meta = make_batch(shape, torch.float32, device, [1], []).meta
    empty = type(meta)(
        meta.cu_seqlens_q[:1], meta.context_lens[:0], meta.block_tables[:0], meta.slot_mapping[:0], 1, 0, 0, 0
    )
    positions = torch.zeros(0, dtype=torch.int64, device=device)
    backend.rope_and_store(q, kv, kv, positions, torch.ones(4, 32, device=device), batch.layer_kv, empty)
    torch.testing.assert_close(batch.layer_kv, before, equal_nan=True)
    assert backend.attend(q, batch.layer_kv, empty, 1.0).shape == (0, 4, 32)


def test_refuses_a_table_of_another_dtype(device: torch.device) -> None:
    batch = make_batch(Shape(4, 2, 32), torch.float32, device, [3], [])
    k = torch.zeros(1, 2, 32, device=device)
    table = torch.ones(8, 32, device=device, dtype=torch.float16)
    with pytest.raises(ValueError, match="cos_sin"):
        TritonBackend(device).rope_and_store(batch.q, k, k, batch.positions, table, batch.layer_kv, batch.meta)
