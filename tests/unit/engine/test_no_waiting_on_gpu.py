"""On a GPU: neither launching a step nor reading what it says waits for more than that step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.common.sampling import SamplingParams
from baton.engine.logprobs import StepLogprobs
from tests.support.engine_harness import greedy, make_request, random_prompt
from tests.support.tiny_model import make_tiny_llama
from tests.unit.engine.test_engine_on_gpu import make_gpu_harness

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5, "frequency_penalty": 0.8, "seed": 1},
    {"presence_penalty": -0.3, "logprobs": 2, "prompt_logprobs": 1, "temperature": 0.0},
    {"logit_bias": ((3, 5.0), (200, -9.0)), "min_p": 0.01, "seed": 2},
    {"min_p": 0.05, "top_p": 0.9, "logprobs": 0, "seed": 3},
    {"min_tokens": 12, "stop_token_ids": frozenset(range(0, 258, 3)), "top_k": 9},
]


def strict(function: Callable[..., Any]) -> Callable[..., Any]:
    """Every call but the first raises where torch would wait for the device, or copy in a way that does."""
    modes = iter(("default",))

    def called(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode(next(modes, "error"))
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return called


@pytest.mark.parametrize("decode_graphs", [False, True])
def test_no_setting_makes_a_launch_or_a_landing_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode_graphs: bool
) -> None:
    model_dir = make_tiny_llama(tmp_path, seed=3, std=0.2)
    harness = make_gpu_harness(model_dir, decode_graphs=decode_graphs, overlap=True, max_num_batched_tokens=50)
    runner = harness.engine._runner
    monkeypatch.setattr(runner, "launch", strict(runner.launch))
    monkeypatch.setattr(StepLogprobs, "land", strict(StepLogprobs.land))
    prompt = random_prompt(41)
    wanted = [
        make_request(f"r{n}", random_prompt(9 + 13 * n, seed=n), SamplingParams(max_tokens=20, **params))
        for n, params in enumerate(SETTINGS)
    ]
    harness.add(greedy("parent", prompt, 30), *wanted)
    harness.run(until=lambda: len(harness.ports.tokens["parent"]) > 2)
    fork = make_request("fork", prompt, SamplingParams(max_tokens=9, seed=4, choice=1), fork_of="parent")
    harness.generate(fork)
    assert fork.num_cached_tokens == 40, "a block was copied"
    assert harness.ports.failures == []
    lengths = [len(harness.ports.tokens[request.request_id]) for request in wanted]
    assert lengths[:4] == [20] * 4
    assert 12 <= lengths[4] <= 20, "the last one has stop tokens"
