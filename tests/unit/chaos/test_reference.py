"""The judge's own model: every family that the engine knows, batched as alone, and refusal of what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from baton.chaos.reference import Reference, Spoken
from baton.common.errors import ConfigError
from tests.support.family_checkpoints import FAMILIES, write_family
from tests.support.tiny_model import make_tiny_llama

MAX_ERROR = 1e-5  # transformers keeps the angles of positions in float32
PROMPT = tuple(range(10, 40))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, object]] = {"linear": {"rope_type": "linear", "factor": 4.0}, "llama3": LLAMA3}


def by_transformers(model: Path) -> Spoken:
    """40 greedy tokens and their log-probabilities in float64."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    tokens, logprobs = list(PROMPT), []
    with torch.inference_mode():
        for _ in range(40):
            scores = theirs(torch.tensor([tokens])).logits[0, -1].log_softmax(dim=-1)
            tokens.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
    return Spoken(PROMPT, tokens[len(PROMPT) :], 0.0, 0, logprobs)


def check(model: Path) -> None:
    reference, spoken = Reference(model), by_transformers(model)
    verdict = reference.judge(spoken)
    assert verdict.wrong_at is None
    assert verdict.logprob_error < MAX_ERROR
    shorter = Spoken(PROMPT, spoken.output[:7], 0.0, 0, spoken.logprobs[:7])
    spoiled = Spoken(PROMPT, [*spoken.output[:5], spoken.output[5] ^ 1, *spoken.output[6:20]], 0.0, 0)
    verdicts = dict(reference.judge_all([shorter, spoiled, spoken]))
    assert [verdicts[index].wrong_at for index in range(3)] == [None, 5, None]
    assert max(verdicts[0].logprob_error, verdicts[2].logprob_error) < MAX_ERROR


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_transformers_says_of_every_family(tmp_path: Path, family: str) -> None:
    write_family(tmp_path, family)
    check(tmp_path)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_it_knows_scaled_rotations(tmp_path: Path, rope: dict[str, object]) -> None:
    check(make_tiny_llama(tmp_path / "tiny", rope_scaling=rope))


def test_log_probabilities_of_other_tokens_are_wrong(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "tiny")
    spoken = by_transformers(model)
    reference = Reference(model)
    for logprobs in (spoken.logprobs[:-1], [*spoken.logprobs[1:], spoken.logprobs[0]]):
        assert reference.judge(Spoken(PROMPT, spoken.output, 0.0, 0, logprobs)).logprob_error > 1e-2


def test_a_weight_that_it_does_not_know_is_refused(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "tiny")
    file = model / "model.safetensors"
    weights = load_file(str(file)) | {"model.layers.0.self_attn.sinks": torch.zeros(4)}
    save_file(weights, str(file), metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.sinks cannot be judged"):
        Reference(model)
