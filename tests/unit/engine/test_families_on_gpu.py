"""Every family on a GPU: greedy tokens in float32 without exception, logits in bfloat16 no worse than transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from baton.common.clock import ManualClock
from baton.common.config import EngineConfig, TransferConfig
from baton.engine.attention.base import AttentionMetadata
from baton.engine.attention.factory import make_backend
from baton.engine.batch import PrefillSegment, ScheduledStep, build_batch
from baton.engine.build import build_engine
from baton.engine.models.config import load_model_config
from baton.engine.models.decoder import Decoder
from baton.engine.models.loader import load_checkpoint
from tests.support.engine_harness import Harness, RecordingPorts, greedy, random_prompt
from tests.support.family_checkpoints import write_family
from tests.unit.engine.test_families import SHAPES, assert_greedy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)
BLOCK = 16
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "attention_bias": True},
    "mistral": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 128, "sliding_window": None},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 96},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_in_float32(tmp_path: Path, shape: str) -> None:
    family, keys = SHAPES[shape]
    model = write_family(tmp_path, family, seed=len(shape), **keys)
    config = EngineConfig.model_validate(
        {"dtype": "float32", "num_blocks": 64, "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 25}
    )
    ports, clock = RecordingPorts(), ManualClock()
    engine = build_engine(config, TransferConfig(layer_groups=2), tmp_path, CUDA, ports, clock)
    engine.poison_fresh_blocks()
    prompts = {f"r{length}": random_prompt(length) for length in (1, 16, 70)}
    harness = Harness(engine, ports, clock)
    tokens = harness.generate(*(greedy(name, prompt, 64) for name, prompt in prompts.items()))
    assert len(set().union(*tokens.values())) > 8
    for name, prompt in prompts.items():
        assert_greedy(model, prompt, tokens[name])


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize(("num_seqs", "chunk"), [(1, 200), (5, 200), (40, 64)])
def test_logits_in_bfloat16(tmp_path: Path, family: str, num_seqs: int, chunk: int) -> None:
    """Prompts in chunks, then tokens one by one in a batch. Distance from float32 with the same weights."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1000, **WIDE[family]}
    model: Any = write_family(tmp_path, family, seed=num_seqs, **shape)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    sequences = torch.randint(0, 1000, (num_seqs, 260), generator=torch.Generator().manual_seed(num_seqs)).tolist()
    exact, rounded = (their_logits(tmp_path, sequences, dtype) for dtype in (torch.float32, torch.bfloat16))
    ours = our_logits(tmp_path, sequences, chunk)
    theirs_off, ours_off = ((x - exact).norm() / exact.norm() for x in (rounded, ours))
    print(f"{family}, {num_seqs} sequences: transformers {theirs_off:.5f}, ours {ours_off:.5f}")
    assert 1e-4 < ours_off < 1.05 * theirs_off
    agree, their_agree = ((x.argmax(-1) == exact.argmax(-1)).double().mean() for x in (ours, rounded))
    assert agree > their_agree - 4 * (0.5 / exact[..., 0].numel()) ** 0.5


def their_logits(model_dir: Path, sequences: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """float64 [sequences, tokens, vocabulary], on the CPU."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    model.to(CUDA)
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([x], device=CUDA)).logits.double().cpu() for x in sequences])


def our_logits(model_dir: Path, sequences: list[list[int]], chunk: int) -> torch.Tensor:
    """The same. All tokens but the last 60 in chunks, the sequences one after the other; the last 60 together."""
    config, per_seq = load_model_config(model_dir), -(-len(sequences[0]) // BLOCK)
    model = Decoder(config, config.max_positions, torch.bfloat16, CUDA)
    load_checkpoint(model, model_dir)
    shape = (config.num_layers, 2, per_seq * len(sequences), BLOCK, config.num_kv_heads, config.head_dim)
    kv_cache = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=CUDA)
    requests = [greedy(f"r{i}", tokens) for i, tokens in enumerate(sequences)]
    for i, request in enumerate(requests):
        request.block_table = list(range(i, per_seq * len(sequences), len(sequences)))
    num_prompt = len(sequences[0]) - 60
    found = torch.zeros(len(sequences), len(sequences[0]), config.vocab_size, dtype=torch.float64)
    with torch.inference_mode():
        for i, request in enumerate(requests):
            for start in range(0, num_prompt, chunk):
                end = min(num_prompt, start + chunk)
                step = ScheduledStep(prefills=(PrefillSegment(request, start, end),))
                found[i, start:end] = logits_of_step(model, kv_cache, step)
        for position in range(num_prompt, len(sequences[0])):
            for request in requests:
                request.num_computed_tokens = position
            found[:, position] = logits_of_step(model, kv_cache, ScheduledStep(decodes=tuple(requests)))
    return found


def logits_of_step(model: Decoder, kv_cache: torch.Tensor, step: ScheduledStep) -> torch.Tensor:
    batch = build_batch(step, BLOCK)
    names = ("cu_seqlens_q", "context_lens", "block_tables", "slot_mapping")
    meta = AttentionMetadata(
        **{name: torch.from_numpy(getattr(batch, name)).to(CUDA) for name in names},
        max_seqlen_q=batch.max_seqlen_q,
        num_prefill_tokens=batch.num_prefill_tokens,
        num_prefills=batch.num_prefills,
        num_decodes=batch.num_decodes,
        fresh_rows=batch.fresh_rows,
        is_padded=False,
    )
    ids, positions = (torch.from_numpy(x).to(CUDA) for x in (batch.input_ids, batch.positions))
    hidden = model.forward(ids, positions, kv_cache, meta, make_backend(CUDA))
    return model.logits(hidden).double().cpu()
