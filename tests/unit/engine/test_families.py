"""Every model family computes what transformers computes: logits within rounding, greedy tokens without exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from baton.engine.attention.base import AttentionMetadata
from baton.engine.attention.torch_reference import TorchBackend
from baton.engine.batch import Batch, PrefillSegment, ScheduledStep, build_batch
from baton.engine.models.config import load_model_config
from baton.engine.models.decoder import Decoder
from baton.engine.models.loader import load_checkpoint
from tests.support.engine_harness import greedy, make_harness, random_prompt
from tests.support.family_checkpoints import edit_config, write_family

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500.0,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3, tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 32}),
    "llama, squeezed": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e3}}),
    "llama, odd sizes": (
        "llama",
        {
            "hidden_size": 66,
            "intermediate_size": 51,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "vocab_size": 301,
        },
    ),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral, a window as long as the model": ("mistral", {"sliding_window": 512, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 40, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "qwen3, tied, biases": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3, llama 3 rope": ("qwen3", {"head_dim": 16, "rope_parameters": LLAMA3}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def logits_of(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def assert_greedy(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> None:
    best = logits_of(model, prompt + tokens)[len(prompt) - 1 : -1].argmax(dim=-1)
    assert tokens == best.tolist()


def metadata_of(batch: Batch) -> AttentionMetadata:
    names = ("cu_seqlens_q", "context_lens", "block_tables", "slot_mapping")
    arrays = {name: torch.from_numpy(getattr(batch, name)) for name in names}
    return AttentionMetadata(
        **arrays,
        max_seqlen_q=batch.max_seqlen_q,
        num_prefill_tokens=batch.num_prefill_tokens,
        num_prefills=batch.num_prefills,
        num_decodes=batch.num_decodes,
        fresh_rows=batch.fresh_rows,
        is_padded=False,
    )


def our_logits(model_dir: Path, tokens: list[int], chunk: int) -> torch.Tensor:
    """Logits of every position, the sequence computed in chunks."""
    config = load_model_config(model_dir)
    model = Decoder(config, config.max_positions, torch.float32, torch.device("cpu"))
    load_checkpoint(model, model_dir)
    num_blocks = -(-len(tokens) // 16)
    kv_cache = torch.full((config.num_layers, 2, num_blocks, 16, config.num_kv_heads, config.head_dim), torch.nan)
    request = greedy("a", tokens)
    request.block_table = list(reversed(range(num_blocks)))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(tokens), chunk):
            step = ScheduledStep(prefills=(PrefillSegment(request, start, min(len(tokens), start + chunk)),))
            batch = build_batch(step, 16)
            ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions)
            parts.append(model.forward(ids, positions, kv_cache, metadata_of(batch), TorchBackend()))
        return model.logits(torch.cat(parts))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_greedy_tokens(tmp_path: Path, shape: str) -> None:
    family, keys = SHAPES[shape]
    model = write_family(tmp_path, family, seed=len(shape), **keys)
    sequence = random_prompt(150)
    torch.testing.assert_close(our_logits(tmp_path, sequence, 60), logits_of(model, sequence), atol=2e-4, rtol=1e-4)
    prompts = {f"r{length}": random_prompt(length) for length in (1, 16, 70)}
    tokens = make_harness(tmp_path, max_num_batched_tokens=25).generate(
        *(greedy(name, prompt, 64) for name, prompt in prompts.items())
    )
    assert len(set().union(*tokens.values())) > 8
    for name, prompt in prompts.items():
        assert_greedy(model, prompt, tokens[name])


@pytest.mark.parametrize(
    ("family", "keys"), [("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {"head_dim": 16})]
)
def test_mixed_batches(tmp_path: Path, family: str, keys: dict[str, Any]) -> None:
    model = write_family(tmp_path, family, seed=5, shard_size="40KB", **keys)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    harness = make_harness(tmp_path, max_num_batched_tokens=23, prefix_cache=False)
    prompts = {f"r{n}": random_prompt(n, seed=n) for n in (1, 16, 31, 70)}
    for name, prompt in prompts.items():
        harness.add(greedy(name, prompt, 64))
        harness.turn()
    harness.run()
    assert any(report.num_prefill_tokens and report.num_decode_seqs > 1 for report in harness.ports.reports)
    for name, prompt in prompts.items():
        assert_greedy(model, prompt, harness.ports.tokens[name])


OLD_LLAMA3 = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


@pytest.mark.parametrize(
    "form",
    [
        {"rope_theta": 500.0, "rope_scaling": OLD_LLAMA3},
        {"rope_theta": 500.0, "rope_scaling": {**OLD_LLAMA3, "rope_type": ..., "type": "llama3"}},
        {"rope_theta": 7.0, "rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
        {"rope_theta": 7.0, "rope_scaling": None, "rope_parameters": LLAMA3},
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": ...}},
        {"original_max_position_embeddings": 32, "rope_parameters": LLAMA3},
    ],
)
def test_every_form_of_rope_means_what_it_means_to_transformers(tmp_path: Path, form: dict[str, object]) -> None:
    write_family(tmp_path, "llama")
    edit_config(tmp_path, rope_parameters=..., rope_theta=...)
    clean = {key: _without_ellipsis(value) for key, value in form.items()}
    edit_config(tmp_path, **clean)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    sequence = random_prompt(140)
    expected = logits_of(reference, sequence)
    torch.testing.assert_close(our_logits(tmp_path, sequence, 200), expected, atol=2e-4, rtol=1e-4)
    edit_config(tmp_path, rope_parameters=..., rope_scaling=..., original_max_position_embeddings=...)
    other = our_logits(tmp_path, sequence, 200)
    assert (other - expected).abs().max() > 0.01  # else the form would not matter here


def _without_ellipsis(value: object) -> object:
    return {k: v for k, v in value.items() if v is not ...} if isinstance(value, dict) else value
