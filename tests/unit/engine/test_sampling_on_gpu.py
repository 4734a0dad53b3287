"""On a GPU in float32: every family and every sampling setting gives the tokens and log-probabilities of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from baton.common.sampling import SamplingParams, TokenLogprobs
from baton.engine.models.config import load_model_config
from baton.engine.models.decoder import Decoder
from baton.engine.models.tiny import write_tiny_llama
from baton.engine.request import Request
from tests.support.engine_harness import Harness, greedy, make_harness, make_request, random_prompt
from tests.unit.engine.test_engine_on_gpu import make_gpu_harness

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 2},
    {"temperature": 0.0, "frequency_penalty": 0.8, "presence_penalty": -0.3, "prompt_logprobs": 1},
    {"temperature": 1.2, "seed": 5, "min_p": 0.02, "logprobs": 0},
    {"temperature": 0.8, "seed": 6, "logit_bias": ((3, 5.0), (200, -9.0)), "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.7, "seed": 7, "min_tokens": 12, "stop_token_ids": frozenset(range(0, 258, 3))},
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2)


def logprobs_of(harness: Harness) -> dict[str, list[TokenLogprobs]]:
    found: dict[str, list[TokenLogprobs]] = {}
    for report in harness.ports.reports:
        for output in report.outputs:
            found.setdefault(output.request_id, []).extend((*output.prompt_logprobs, *output.logprobs))
    return found


@pytest.mark.parametrize("overlap", [False, True])
def test_settings_and_log_probabilities(model_dir: Path, overlap: bool) -> None:
    def requests() -> list[Request]:
        wanted = [
            make_request(f"r{n}", random_prompt(9 + 13 * n, seed=n), SamplingParams(max_tokens=40, **params))
            for n, params in enumerate(SETTINGS)
        ]
        return [*wanted, *(greedy(f"g{n}", random_prompt(40, seed=n), 30 + n) for n in range(3))]

    on_cpu, on_gpu = make_harness(model_dir), make_gpu_harness(model_dir, overlap=overlap, max_num_batched_tokens=50)
    assert on_gpu.generate(*requests()) == on_cpu.generate(*requests())
    expected, got = logprobs_of(on_cpu), logprobs_of(on_gpu)
    for name in expected:
        for one, other in zip(got[name], expected[name], strict=True):
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    on_gpu.assert_at_rest()


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}, "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_attention_heads": 6, "num_key_value_heads": 3},
}


def write_checkpoint(path: Path, keys: dict[str, Any]) -> Path:
    """A random checkpoint with the tensors that the config asks for."""
    write_tiny_llama(path, **keys)
    config = load_model_config(path)
    views = Decoder(config, 8, torch.float32, torch.device("cpu")).checkpoint_views()
    generator = torch.Generator().manual_seed(8)
    for name, view in views.items():
        noise = torch.randn(view.shape, generator=generator)
        view.copy_(1.0 + 0.1 * noise if name.endswith("norm.weight") else 0.15 * noise)
    save_file({name: view.clone() for name, view in views.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    model_dir = write_checkpoint(tmp_path, FAMILIES[family])

    def requests() -> list[Request]:
        return [greedy(f"g{n}", random_prompt(n, seed=n), 64) for n in (1, 16, 70)]

    on_gpu = make_gpu_harness(model_dir, max_num_batched_tokens=50)
    tokens = on_gpu.generate(*requests())
    assert tokens == make_harness(model_dir).generate(*requests())
    assert len(set().union(*tokens.values())) > 5
    on_gpu.assert_at_rest()


@pytest.mark.parametrize("decode_graphs", [False, True])
@pytest.mark.parametrize("length", [17, 40, 48])
def test_forks_share_and_copy_blocks_while_their_parent_decodes(
    model_dir: Path, length: int, decode_graphs: bool
) -> None:
    """With overlap, as GPUs have it: a block is copied behind the parent's step that is under way."""
    prompt = random_prompt(length)

    def choice(number: int) -> Request:
        sampling = SamplingParams(max_tokens=30, seed=2, choice=number)
        return make_request(f"c{number}", prompt, sampling, fork_of="c0" if number else "")

    names = [f"c{number}" for number in range(5)]
    expected = {name: make_harness(model_dir).generate(choice(int(name[1:])))[name] for name in names}
    harness = make_gpu_harness(model_dir, decode_graphs=decode_graphs, prefix_cache=False)
    harness.add(choice(0))
    harness.run(until=lambda: len(harness.ports.tokens["c0"]) > 4)
    forks = [choice(number) for number in range(1, 5)]
    harness.add(*forks)
    harness.run()
    assert [fork.num_cached_tokens for fork in forks] == [length - 1] * 4
    assert {name: harness.ports.tokens[name] for name in names} == expected
    harness.assert_at_rest()
