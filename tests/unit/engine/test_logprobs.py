"""Log-probabilities are those of the model, whatever the settings, the chunks, the cache and the company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from baton.common.sampling import SamplingParams, TokenLogprobs
from baton.engine.request import Request
from tests.support.engine_harness import Harness, greedy, make_harness, make_request, random_prompt
from tests.support.tiny_model import make_tiny_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2)


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float64)


def assert_logprobs(
    reference: LlamaForCausalLM, tokens: list[int], start: int, got: list[TokenLogprobs], num_top: int
) -> None:
    """`got` describes tokens[start:start + len(got)]."""
    with torch.inference_mode():
        logprobs = reference(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
    assert len(got) > 0
    for index, known in enumerate(got):
        row = logprobs[start + index - 1]
        assert known.token_id == tokens[start + index]
        assert known.logprob == pytest.approx(float(row[known.token_id]), abs=1e-4)
        assert known.rank == 1 + int((row > row[known.token_id]).sum())
        best = row.topk(num_top)
        assert [token for token, _ in known.top] == best.indices.tolist()
        assert [value for _, value in known.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def wanting(name: str, prompt: list[int], max_tokens: int = 12, **params: object) -> Request:
    values: dict[str, object] = {"temperature": 0.0, **params}
    return make_request(name, prompt, SamplingParams(max_tokens=max_tokens, **values))  # type: ignore[arg-type]


def outputs(harness: Harness, name: str) -> tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]:
    """Tokens, their log-probabilities, the prompt's."""
    of_request = [o for report in harness.ports.reports for o in report.outputs if o.request_id == name]
    assert not any(output.prompt_logprobs for output in of_request[1:])
    logprobs = [known for output in of_request for known in output.logprobs]
    return [t for o in of_request for t in o.token_ids], logprobs, list(of_request[0].prompt_logprobs)


@pytest.mark.parametrize("overlap", [False, True])
def test_drawn_tokens(model_dir: Path, reference: LlamaForCausalLM, overlap: bool) -> None:
    """Settings change which token is drawn, never what is said of it; others in the batch have their own."""
    harness = make_harness(model_dir, max_num_batched_tokens=24, overlap=overlap)
    prompts = {name: random_prompt(n, seed=n) for name, n in (("a", 1), ("b", 30), ("c", 33), ("d", 5))}
    harness.add(
        wanting("a", prompts["a"], logprobs=3),
        wanting("b", prompts["b"], logprobs=0, temperature=1.5, seed=4, top_k=9),
        wanting("c", prompts["c"], logprobs=5, repetition_penalty=1.8, presence_penalty=0.5, logit_bias=((7, 3.0),)),
        greedy("d", prompts["d"], 12),
    )
    harness.run()
    for name, num_top in (("a", 3), ("b", 0), ("c", 5)):
        tokens, logprobs, of_prompt = outputs(harness, name)
        assert len(tokens) == len(logprobs) == 12
        assert not of_prompt
        assert_logprobs(reference, prompts[name] + tokens, len(prompts[name]), logprobs, num_top)
    assert any(known.rank > 1 for known in outputs(harness, "c")[1])
    assert outputs(harness, "d")[1] == []
    harness.assert_at_rest()


@pytest.mark.parametrize("budget", [7, 16, 300])
def test_prompts_in_chunks_and_over_a_cached_prefix(model_dir: Path, reference: LlamaForCausalLM, budget: int) -> None:
    harness = make_harness(model_dir, max_num_batched_tokens=budget)
    prompt = random_prompt(70)
    harness.generate(greedy("before", prompt, 4))
    request = wanting("a", prompt, 3, prompt_logprobs=2, logprobs=1)
    harness.generate(request)
    assert request.num_cached_tokens == 0
    tokens, logprobs, of_prompt = outputs(harness, "a")
    assert len(of_prompt) == 69
    assert_logprobs(reference, prompt + tokens, 1, of_prompt, 2)
    assert_logprobs(reference, prompt + tokens, 70, logprobs, 1)
    again = greedy("after", prompt, 4)
    harness.generate(again)
    assert again.num_cached_tokens == 64
    harness.assert_at_rest()


def test_a_prompt_longer_than_what_is_computed_at_once(
    model_dir: Path, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.engine.logprobs.MAX_LOGPROB_ROWS", 16)
    harness = make_harness(model_dir, max_num_batched_tokens=50)
    prompts = {"a": random_prompt(100), "b": random_prompt(1), "c": random_prompt(2)}
    harness.generate(*(wanting(name, prompt, 1, prompt_logprobs=0) for name, prompt in prompts.items()))
    for name, prompt in prompts.items():
        of_prompt = outputs(harness, name)[2]
        assert len(of_prompt) == len(prompt) - 1
        if of_prompt:
            assert_logprobs(reference, prompt, 1, of_prompt, 0)


def test_a_hand_over_tells_them_with_its_first_token(model_dir: Path, reference: LlamaForCausalLM) -> None:
    harness = make_harness(model_dir, max_num_batched_tokens=16)
    prompt = random_prompt(40)
    sampling = SamplingParams(max_tokens=5, temperature=0.0, logprobs=2, prompt_logprobs=1)
    harness.add(make_request("a", prompt, sampling, hand_over=True))
    harness.run()
    [done] = harness.ports.prefills
    assert_logprobs(reference, [*prompt, done.first_token], 1, list(done.prompt_logprobs), 1)
    assert_logprobs(reference, [*prompt, done.first_token], 40, list(done.logprobs), 2)


def test_only_the_attempt_with_the_first_token_reports_on_the_prompt(model_dir: Path) -> None:
    harness = make_harness(model_dir)
    sampling = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=1)
    harness.generate(make_request("a", random_prompt(20), sampling, num_emitted=4))
    assert outputs(harness, "a")[2] == []
