"""Padded batches through the Triton backend: bit for bit what the same kernels give for the batch alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch

from baton.engine.attention.base import AttentionMetadata
from baton.engine.attention.triton_backend import TritonBackend
from baton.engine.batch import PrefillSegment, ScheduledStep, build_batch
from baton.engine.kernels.greedy import greedy_tokens
from baton.engine.padded_steps import PaddedSteps
from tests.kernels.reference import Batch, Shape, assert_close, attention, make_batch
from tests.support.engine_harness import greedy, make_harness, random_prompt
from tests.support.tiny_model import make_tiny_llama

GQA, MHA = Shape(6, 2, 32), Shape(8, 8, 16, 32)


def padded(
    batch: Batch, num_decodes: int, num_prefills: int, num_tokens: int
) -> tuple[torch.Tensor, AttentionMetadata]:
    """The same batch in larger buffers: q and metadata. What is not there has no row; spare q is NaN."""
    meta, device = batch.meta, batch.q.device
    decodes, prefills = meta.num_decodes, meta.num_prefills
    ends = meta.cu_seqlens_q[decodes:].tolist()
    missing = num_prefills - prefills
    starts = [*range(decodes), *[decodes] * (num_decodes - decodes), *ends, *ends[-1:] * missing]
    lens = meta.context_lens.tolist()
    lens = [*lens[:decodes], *[0] * (num_decodes - decodes), *lens[decodes:], *[0] * missing]
    tables = torch.full((num_decodes + num_prefills, meta.block_tables.shape[1]), 2**30, dtype=torch.int32)
    tables[:decodes] = meta.block_tables[:decodes]
    tables[num_decodes : num_decodes + prefills] = meta.block_tables[decodes:]
    q = torch.full((num_tokens, *batch.q.shape[1:]), torch.nan, dtype=batch.q.dtype, device=device)
    q[: len(batch.q)] = batch.q
    return q, AttentionMetadata(
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slot_mapping=torch.full((num_tokens,), -1, device=device),
        max_seqlen_q=num_tokens,
        num_prefill_tokens=num_tokens,
        num_prefills=num_prefills,
        num_decodes=num_decodes,
        is_padded=True,
    )


@pytest.mark.parametrize(
    ("shape", "decodes", "prefills"),
    [
        (GQA, [], [(1, 1)]),
        (MHA, [], [(33, 17), (5, 5), (16, 16)]),
        (GQA, [18, 1], [(40, 33), (64, 1)]),
        (MHA, [16, 33, 5], [(17, 1)]),
    ],
    ids=["one token", "several", "mixed", "mostly decodes"],
)
def test_padding_changes_no_bit(
    shape: Shape, decodes: list[int], prefills: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("in the interpreter, one type shows which rows are read and written")
    batch = make_batch(shape, dtype, device, decodes, prefills)
    backend = TritonBackend(device)
    out = backend.attend(batch.q, batch.layer_kv, batch.meta, 0.25)
    assert_close(out, attention(batch, 0.25), dtype)
    q, meta = padded(batch, 4 if decodes else 0, 5, 64)
    found = backend.attend(q, batch.layer_kv, meta, 0.25)
    assert torch.equal(found[: len(out)], out)


def test_a_batch_of_padding_alone(device: torch.device) -> None:
    batch = make_batch(Shape(6, 2, 32), torch.float32, device, [18], [(33, 17)])
    q, meta = padded(batch, 3, 3, 32)
    nothing = replace(
        meta, cu_seqlens_q=torch.zeros_like(meta.cu_seqlens_q), context_lens=torch.zeros_like(meta.context_lens)
    )
    out = TritonBackend(device).attend(q, batch.layer_kv, nothing, 0.25)
    assert (out[:3] == 0).all(), "rows of decodes that are not there"
    assert out[3:].isnan().all(), "nothing else is written"


@pytest.mark.parametrize("num_new", [[33], [1, 0, 64, 0, 31], [0, 0, 5], [16] * 7], ids=str)
def test_every_token_has_one_tile(num_new: list[int], device: torch.device) -> None:
    """Values of a sequence are its number: a tile that took another sequence or range shows in the output."""
    shape = Shape(2, 2, 16)
    batch = make_batch(shape, torch.float32, device, [], [(length, length) for length in num_new])
    bounds = list(accumulate(num_new, initial=0))
    for i, length in enumerate(num_new):
        for block in batch.meta.block_tables[i, : -(-length // 16)].tolist():
            batch.layer_kv[1, block] = float(i)
    meta = replace(batch.meta, is_padded=True, num_prefill_tokens=sum(num_new) + 9)
    q = torch.cat((batch.q, torch.full((9, 2, 16), torch.nan, device=device)))
    out = TritonBackend(device).attend(q, batch.layer_kv, meta, 0.25)
    for i, (start, end) in enumerate(pairwise(bounds)):
        torch.testing.assert_close(out[start:end], torch.full_like(out[start:end], float(i)))
    assert out[bounds[-1] :].isnan().all()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="in the interpreter; a GPU captures such steps in tests of its own"
)
def test_a_model_through_the_kernels(tmp_path: Path) -> None:
    """Two prompts, one of which has a prefix, beside two that decode: the draws and logits of the step alone."""
    runner = make_harness(make_tiny_llama(tmp_path, seed=3, std=0.2, num_hidden_layers=1), num_blocks=16).engine._runner
    runner.backend = TritonBackend(torch.device("cpu"))
    runner.kv_cache.normal_()
    before = runner.kv_cache.clone()
    requests = [greedy(f"r{n}", random_prompt(n)) for n in (17, 5, 20, 16)]
    for i, (request, computed) in enumerate(zip(requests, (16, 4, 16, 0), strict=True)):
        request.block_table, request.num_computed_tokens = [3 * i + 2, 3 * i + 1], computed
    step = ScheduledStep(
        tuple(requests[:2]), tuple(PrefillSegment(r, r.num_computed_tokens, len(r.token_ids)) for r in requests[2:])
    )
    steps = PaddedSteps(runner, greedy_tokens, 36, 4, 16)
    with torch.inference_mode():
        batch = build_batch(step, 16)
        _, expected = runner._forward(batch, None)
        tokens = runner._draw(expected, step.sampled(), batch.draw_positions)
        written = runner.kv_cache.clone()
        runner.kv_cache.copy_(before)
        logits = steps.compute(steps.fill(step, batch))
    assert torch.equal(runner.draws[:4], tokens)
    assert torch.equal(runner.kv_cache[0], written[0]), "before the first product over other numbers of rows"
    torch.testing.assert_close(logits[:4], expected, rtol=1e-4, atol=1e-4)
