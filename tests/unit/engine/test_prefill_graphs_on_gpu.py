"""Captured steps with prompts against the same steps launched kernel by kernel, replayed for ever other steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.common.clock import ManualClock
from baton.common.config import EngineConfig, TransferConfig
from baton.engine.batch import PrefillSegment, ScheduledStep, build_batch
from baton.engine.build import build_engine
from baton.engine.device_parts import make_device_parts
from baton.engine.runner import Runner
from tests.support.engine_harness import RecordingPorts, greedy, random_prompt
from tests.support.tiny_model import make_tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)
BLOCK = 16
LIMIT = 320
# Contexts of decodes, [start, end) of segments. In this order, so that a graph is replayed with fewer sequences too.
STEPS: list[tuple[list[int], list[tuple[int, int]]]] = [
    ([], [(0, 320)]),
    ([], [(0, 300)]),
    ([], [(0, 1)]),
    ([], [(16, 17), (0, 64), (32, 65)]),
    ([], [(0, 60)]),
    ([40, 1, 200], [(0, 100), (64, 130)]),
    ([200], [(0, 100)]),
    ([33] * 15, [(0, 200)]),
    ([], [(128, 200), (0, 200)]),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=5, std=0.1, **shape)


def make_runner(model_dir: Path, dtype: str) -> Runner:
    settings: dict[str, Any] = {"dtype": dtype, "num_blocks": 400, "max_model_len": 512, "max_num_seqs": 20}
    settings |= {"max_num_batched_tokens": 512, "prefill_graph_tokens": LIMIT}
    config = EngineConfig.model_validate(settings)
    return build_engine(config, TransferConfig(), model_dir, CUDA, RecordingPorts(), ManualClock())._runner


def make_step(decodes: list[int], prefills: list[tuple[int, int]], number: int) -> ScheduledStep:
    free = torch.randperm(400, generator=torch.Generator().manual_seed(number)).tolist()
    spans = [(context - 1, context) for context in decodes] + prefills
    requests = [greedy(f"r{number}-{i}", random_prompt(end, seed=i)) for i, (_, end) in enumerate(spans)]
    for request, (start, end) in zip(requests, spans, strict=True):
        request.block_table = [free.pop() for _ in range(-(-end // BLOCK))]
        request.num_computed_tokens = start
    segments = zip(requests[len(decodes) :], prefills, strict=True)
    return ScheduledStep(tuple(requests[: len(decodes)]), tuple(PrefillSegment(r, *span) for r, span in segments))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_replays_give_what_launching_gives(model_dir: Path, dtype: str) -> None:
    """Tokens, logits and cache. In float32 nearly the same bits; in bfloat16 as near as sums in another order are."""
    runner = make_runner(model_dir, dtype)
    path: Any = runner.prefill_path
    rtol, atol = (1e-4, 1e-4) if dtype == "float32" else (0.05, 0.05)
    for number, (decodes, prefills) in enumerate(STEPS):
        step = make_step(decodes, prefills, number)
        batch = build_batch(step, BLOCK)
        runner.kv_cache.normal_()
        before = runner.kv_cache.clone()
        _, logits = runner._forward(batch, None)
        tokens = runner._draw(logits, step.sampled(), batch.draw_positions)
        written = runner.kv_cache.clone()
        runner.kv_cache.copy_(before)
        assert path.takes(step)
        told: list[int] = []
        assert path.launch(step, batch, told.append) == len(decodes) + len(prefills)
        assert tuple(layer + 1 for layer in told) == path.cuts
        captured = path._captured[path._steps.fill(step, batch)].output[: len(logits)]
        torch.testing.assert_close(captured, logits, rtol=rtol, atol=atol)
        torch.testing.assert_close(runner.kv_cache, written, rtol=rtol, atol=atol)
        unchanged = (written == before).all(dim=(0, 1, 3, 4, 5))  # blocks of no sequence of the step
        assert torch.equal(runner.kv_cache[:, :, unchanged], before[:, :, unchanged])
        if dtype == "float32":
            assert torch.equal(runner.draws[: len(tokens)], tokens)


def test_memory_of_the_graphs_is_counted(model_dir: Path) -> None:
    """What preparing takes is at most what was measured before, give or take the allocator's granularity.

    Alone on its GPU: what others take meanwhile would be counted too.
    """
    settings: dict[str, Any] = {"num_blocks": 64, "max_model_len": 512, "max_num_batched_tokens": 512}
    config = EngineConfig.model_validate({**settings, "prefill_graph_tokens": 512})
    runner = build_engine(config, TransferConfig(), model_dir, CUDA, RecordingPorts(), ManualClock())._runner
    paths = make_device_parts(CUDA).make_step_paths(runner, config, 512)
    assert paths.prefill is not None
    assert paths.decode is not None
    measured = paths.prefill.measure() + paths.decode.measure()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(CUDA)[0]
    paths.prefill.prepare()
    paths.decode.prepare()
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info(CUDA)[0] <= measured + 2**27
