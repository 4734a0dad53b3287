"""Both backends on mixed batches against float64, and the choice between them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from baton.engine.attention import torch_reference
from baton.engine.attention.base import AttentionBackend
from baton.engine.attention.factory import make_backend
from baton.engine.attention.torch_reference import TorchBackend
from baton.engine.attention.triton_backend import TritonBackend
from tests.kernels.reference import Shape, assert_close, attention, make_batch


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> AttentionBackend:
    return TorchBackend() if request.param == "torch" else TritonBackend(device)


@pytest.mark.parametrize(
    ("decodes", "prefills"),
    [([18, 0, 1], [(33, 17), (5, 5)]), ([], [(19, 3)]), ([32, 4], []), ([0], [(16, 16)])],
    ids=["mixed", "no decode", "no prefill", "padding and prefill"],
)
def test_mixed_batch(
    decodes: list[int], prefills: list[tuple[int, int]], backend: AttentionBackend, device: torch.device
) -> None:
    batch = make_batch(Shape(6, 2, 32), torch.float32, device, decodes, prefills)
    out = backend.attend(batch.q, batch.layer_kv, batch.meta, 0.25)
    assert_close(out, attention(batch, 0.25), torch.float32)


@pytest.mark.parametrize("padding", [0, 10**6], ids=["per sequence", "batched"])
def test_both_torch_decodes(padding: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(torch_reference, "_PADDING_PER_SEQ", padding)
    batch = make_batch(Shape(6, 2, 32), torch.float32, device, [100, 0, 1, 3], [(9, 2)])
    out = TorchBackend().attend(batch.q, batch.layer_kv, batch.meta, 0.25)
    assert_close(out, attention(batch, 0.25), torch.float32)


def test_torch_prefill_equals_one_dense_pass(device: torch.device) -> None:
    """A prompt in chunks, through the cache, gives what one dense causal pass over the same rows gives."""
    shape = Shape(4, 2, 32)
    whole = make_batch(shape, torch.float32, device, [], [(48, 48)])
    k, v = (x[0].to(device).transpose(0, 1).unsqueeze(0) for x in (whole.keys, whole.values))
    q = whole.q.transpose(0, 1).unsqueeze(0)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.25)[0].transpose(0, 1)
    backend = TorchBackend()
    meta = whole.meta
    parts = []
    for start, end in ((0, 10), (10, 40), (40, 48)):
        chunk = type(meta)(
            cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32, device=device),
            context_lens=torch.tensor([end], dtype=torch.int32, device=device),
            block_tables=meta.block_tables,
            slot_mapping=meta.slot_mapping[start:end],
            max_seqlen_q=end - start,
            num_prefill_tokens=end - start,
            num_prefills=1,
            num_decodes=0,
        )
        parts.append(backend.attend(whole.q[start:end], whole.layer_kv, chunk, 0.25))
    torch.testing.assert_close(torch.cat(parts), dense, rtol=1e-5, atol=1e-5)


def test_the_cpu_gets_torch_and_a_gpu_gets_triton(device: torch.device) -> None:
    assert isinstance(make_backend(torch.device("cpu")), TorchBackend)
    if device.type == "cuda":
        assert isinstance(make_backend(device), TritonBackend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN runs on a GPU only")
@pytest.mark.parametrize("lengths", [(1900,), (2048, 1024), (3000, 1950)])
def test_fresh_prompts_in_dense_attention(lengths: tuple[int, ...], device: torch.device) -> None:
    """Padded to a length that cuDNN has a plan for, with NaN behind every prompt."""
    shape = Shape(8, 2, 128)
    batch = make_batch(shape, torch.bfloat16, device, [40, 7], [(length, length) for length in lengths])
    starts = [2, 2 + lengths[0], 2 + sum(lengths)]
    meta = replace(batch.meta, fresh_rows=tuple(pairwise(starts[: len(lengths) + 1])))
    fresh = [
        torch.cat([torch.full((2, 2, 128), torch.nan), *(x.float() for x in kept[2:])]).bfloat16().to(device)
        for kept in (batch.keys, batch.values)
    ]
    backend = TritonBackend(device)
    assert backend.uses_dense(batch.q, meta)
    out = backend.attend(batch.q, batch.layer_kv, meta, 0.1, (fresh[0], fresh[1]))
    assert_close(out, attention(batch, 0.1), torch.bfloat16)
