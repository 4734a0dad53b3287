"""Greedy tokens in float32 are those of transformers, whatever the shape, the chunking, the company and the cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.support.engine_harness import Harness, greedy, make_harness, random_prompt
from tests.support.tiny_model import make_tiny_llama

SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "odd heads, 24 wide": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "hidden_size": 96},
    "one kv head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1},
    "newer rope form": {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def reference(model_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def assert_greedy(model_dir: Path, prompt: list[int], tokens: list[int]) -> None:
    """Every token is the largest logit of transformers' own forward over what comes before it."""
    with torch.inference_mode():
        logits = reference(model_dir)(torch.tensor([prompt + tokens])).logits[0]
    assert tokens == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(tmp_path: Path, shape: str) -> None:
    model_dir = make_tiny_llama(tmp_path, **{k: v for k, v in SHAPES[shape].items() if v is not None})
    prompt = random_prompt(37)
    tokens = make_harness(model_dir).generate(greedy("a", prompt, 48))["a"]
    assert len(set(tokens)) > 5
    assert_greedy(model_dir, prompt, tokens)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2)


@pytest.mark.parametrize(
    ("length", "budget"),
    [(1, 8), (2, 2048), (15, 16), (16, 8), (16, 2048), (17, 16), (32, 50), (33, 16), (33, 2048), (100, 8), (100, 50)],
)
def test_prompt_lengths_and_chunks(model_dir: Path, length: int, budget: int) -> None:
    prompt = random_prompt(length, seed=budget)
    harness = make_harness(model_dir, max_num_batched_tokens=budget)
    tokens = harness.generate(greedy("a", prompt, 33))["a"]
    assert_greedy(model_dir, prompt, tokens)
    assert max(report.num_prefill_tokens for report in harness.ports.reports) <= budget
    harness.assert_at_rest()


@pytest.mark.parametrize("block_size", [16, 32])
def test_mixed_batches(model_dir: Path, block_size: int) -> None:
    """Requests of different lengths that join while others decode, with a budget that cuts prompts anywhere."""
    harness = make_harness(model_dir, max_num_batched_tokens=23, block_size=block_size, prefix_cache=False)
    prompts = {f"r{n}": random_prompt(n, seed=n) for n in (1, 5, 16, 31, 40, 70)}
    for number, (name, prompt) in enumerate(prompts.items()):
        harness.add(greedy(name, prompt, 40 - number))
        harness.turn()
        harness.turn()
    harness.run()
    assert any(report.num_prefill_tokens and report.num_decode_seqs > 1 for report in harness.ports.reports)
    for number, (name, prompt) in enumerate(prompts.items()):
        tokens = harness.ports.tokens[name]
        assert len(tokens) == 40 - number
        assert_greedy(model_dir, prompt, tokens)
    harness.assert_at_rest()


def test_prefix_cache_hits(model_dir: Path) -> None:
    """A second prompt shares blocks with the first; a third repeats it and all but one token of it are cached."""
    harness = make_harness(model_dir)
    first = random_prompt(64)
    second = first[:40] + random_prompt(20, seed=9)
    for name, prompt, cached in (("a", first, 0), ("b", second, 32), ("c", first, 48), ("d", first[:33], 32)):
        request = greedy(name, prompt, 32)
        tokens = harness.generate(request)[name]
        assert request.num_cached_tokens == cached, name
        assert_greedy(model_dir, prompt, tokens)
    harness.assert_at_rest()


def test_a_prefix_is_shared_while_it_is_in_use(model_dir: Path) -> None:
    harness = make_harness(model_dir)
    prompt = random_prompt(48)
    harness.add(greedy("a", prompt, 40))
    harness.run(until=lambda: len(harness.ports.tokens["a"]) > 2)
    alone = harness.blocks.running
    harness.add(greedy("b", prompt, 40))
    harness.turn()
    assert harness.blocks.running == alone + 1
    harness.run()
    assert harness.ports.tokens["a"] == harness.ports.tokens["b"]
    assert_greedy(model_dir, prompt, harness.ports.tokens["b"])


def test_generated_tokens_are_cached_too(model_dir: Path) -> None:
    """The next turn of a conversation starts with the last one's answer."""
    harness = make_harness(model_dir)
    prompt = random_prompt(20)
    answer = harness.generate(greedy("a", prompt, 40))["a"]
    request = greedy("b", [*prompt, *answer, 1, 2, 3], 24)
    tokens = harness.generate(request)["b"]
    assert request.num_cached_tokens == 48
    assert_greedy(model_dir, [*prompt, *answer, 1, 2, 3], tokens)


def _evict_everything(harness: Harness) -> None:
    harness.generate(greedy("big", random_prompt(240, seed=99), 16))


def test_evicted_blocks_are_computed_again(model_dir: Path) -> None:
    harness = make_harness(model_dir, num_blocks=16)
    prompt = random_prompt(64)
    before = harness.generate(greedy("a", prompt))["a"]
    _evict_everything(harness)
    request = greedy("b", prompt)
    assert harness.generate(request)["b"] == before
    assert request.num_cached_tokens == 0
    assert_greedy(model_dir, prompt, before)
