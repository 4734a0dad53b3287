"""litellm, langchain-openai and lm-eval, each in a process of its own as an application would run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from baton.demo_model import demo_model_path
from router.tokenizer import Tokenizer
from tests.clients.conftest import HERE, MODEL, ClientEnvironment

pytestmark = pytest.mark.clients


def test_litellm(clients: ClientEnvironment) -> None:
    result = clients.program("litellm_client")
    assert len(result["whole"].split()) > 1
    assert result["streamed"] == result["whole"]
    assert result["several"] == [result["whole"]] * 4
    assert result["usage"] == result["streamed_usage"] == 8
    assert result["completion"]
    assert "response_format" in result["refusal"]


def test_langchain_openai(clients: ClientEnvironment) -> None:
    result = clients.program("langchain_client")
    assert len(result["whole"].split()) > 1
    assert result["streamed"] == result["chain"] == result["whole"]
    assert result["batch"] == [result["whole"]] * 2
    assert result["usage"] == result["streamed_usage"] == result["logprobs"] == 8
    assert result["finish_reason"] == "length"
    assert result["history"]
    assert result["completion"]
    assert result["refusal"] == "tools"


def test_lm_eval_gets_the_models_likelihoods(clients: ClientEnvironment, tmp_path: Path) -> None:
    """Choices are rated by echo and logprobs of token-id prompts: compared with what transformers computes."""
    arguments = {
        "model": MODEL,
        "base_url": f"{clients.url}/v1/completions",
        "num_concurrent": 2,
        "max_retries": 1,
        "tokenized_requests": True,
        "tokenizer_backend": "huggingface",
        "tokenizer": str(demo_model_path()),
        "max_length": 1024,
    }
    model_args = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = ["-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model_args]
    command += ["--tasks", "words_choice,words_until", "--include_path", str(tmp_path / "tasks")]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "2"]
    _write_tasks(tmp_path / "tasks")
    clients.run(*command)

    choices = _samples(tmp_path / "out", "words_choice")
    assert len(choices) == 4
    oracle = _Oracle()
    for sample in choices:
        for arguments_of_one, (logprob, is_greedy) in zip(
            sample["arguments"].values(), sample["filtered_resps"], strict=True
        ):
            expected, greedy = oracle.likelihood(arguments_of_one["arg_0"], arguments_of_one["arg_1"])
            assert float(logprob) == pytest.approx(expected, abs=0.02)
            assert (str(is_greedy) == "True") == greedy
    for sample in _samples(tmp_path / "out", "words_until"):
        (text,) = sample["filtered_resps"]
        assert text.strip()
        assert "." not in text
        assert ";" not in text


def _write_tasks(folder: Path) -> None:
    """The tasks of this directory with the data set's place filled in: it is looked for where lm-eval is started."""
    folder.mkdir()
    data = HERE / "tasks" / "words.jsonl"
    for task in (HERE / "tasks").glob("*.yaml"):
        (folder / task.name).write_text(task.read_text().replace("words.jsonl", str(data)))


def _samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


class _Oracle:
    """The demo model in transformers. lm-eval gives prompts without BOS unless told otherwise."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.load(demo_model_path())
        self._model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)

    def likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-probability of the continuation's tokens, and whether each is the likeliest."""
        before = self._tokenizer.encode(context, add_special_tokens=False)
        whole = self._tokenizer.encode(context + continuation, add_special_tokens=False)
        with torch.no_grad():
            logprobs = torch.log_softmax(self._model(torch.tensor([whole])).logits[0], -1)
        rows = logprobs[len(before) - 1 : len(whole) - 1]
        ids = torch.tensor(whole[len(before) :])
        return float(rows.gather(1, ids[:, None]).sum()), bool((rows.argmax(1) == ids).all())
