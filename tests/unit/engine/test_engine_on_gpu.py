"""The engine on a GPU: the same tokens in float32, announcements with events, a pool sized from free memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.common.clock import ManualClock
from baton.common.config import EngineConfig, TransferConfig
from baton.common.errors import ConfigError
from baton.engine.build import build_engine
from baton.engine.ports import Release
from baton.engine.request import Request
from tests.support.engine_harness import Harness, RecordingPorts, greedy, make_harness, random_prompt, seeded
from tests.support.tiny_model import make_tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2, **shape)


def make_gpu_harness(model_dir: Path, **settings: object) -> Harness:
    ports, clock = RecordingPorts(), ManualClock()
    defaults = {"dtype": "float32", "num_blocks": 64, "max_model_len": 256, "prefill_graph_tokens": 0}
    config = EngineConfig.model_validate({**defaults, **settings})
    engine = build_engine(config, TransferConfig(layer_groups=3), model_dir, CUDA, ports, clock)
    engine.poison_fresh_blocks()
    return Harness(engine, ports, clock)


def test_float32_gives_the_tokens_of_the_cpu(model_dir: Path) -> None:
    def requests() -> list[object]:
        lengths = (1, 16, 33, 70)
        return [
            *(greedy(f"g{n}", random_prompt(n, seed=n), 40) for n in lengths),
            *(seeded(f"s{n}", random_prompt(n, seed=n), 40, seed=n, top_p=0.9) for n in lengths),
        ]

    on_cpu = make_harness(model_dir, max_num_batched_tokens=50).generate(*requests())  # type: ignore[arg-type]
    harness = make_gpu_harness(model_dir, max_num_batched_tokens=50)
    assert harness.generate(*requests()) == on_cpu  # type: ignore[arg-type]
    again = harness.generate(greedy("again", random_prompt(70, seed=70), 40))["again"]
    assert again == on_cpu["g70"]
    harness.assert_at_rest()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("decode_graphs", "prefill_graph_tokens"), [(True, 0), (False, 0), (True, 64), (False, 50)])
def test_graphs_and_overlap_change_no_token(
    model_dir: Path, overlap: bool, decode_graphs: bool, prefill_graph_tokens: int
) -> None:
    """Batches that grow and shrink through several sizes of graph, draws of both kinds, blocks that are used again."""

    def requests() -> list[Request]:
        found = [greedy(f"g{n}", random_prompt(5 + 7 * n, seed=n), 10 + 9 * n) for n in range(7)]
        return found + [seeded(f"s{n}", random_prompt(9 + 11 * n, seed=n), 50 - 5 * n, seed=n) for n in range(6)]

    settings: dict[str, Any] = {"max_num_seqs": 11, "max_num_batched_tokens": 64, "num_blocks": 48}
    on_cpu = make_harness(model_dir, **settings).generate(*requests())
    graphs = {"decode_graphs": decode_graphs, "prefill_graph_tokens": prefill_graph_tokens}
    harness = make_gpu_harness(model_dir, overlap=overlap, **graphs, **settings)
    assert harness.generate(*requests()) == on_cpu
    harness.assert_at_rest()


@pytest.mark.parametrize(("prefill_graph_tokens", "per_step"), [(0, 3), (256, 2)])
def test_announcements_carry_an_event(model_dir: Path, prefill_graph_tokens: int, per_step: int) -> None:
    harness = make_gpu_harness(model_dir, max_num_batched_tokens=48, prefill_graph_tokens=prefill_graph_tokens)
    harness.add(greedy("h", random_prompt(70), hand_over=True))
    harness.run()
    assert len(harness.ports.segments) == 2 * per_step
    for segment in harness.ports.segments:
        assert segment.event is not None
        segment.event.synchronize()
        if segment.block_end < 5:
            layers = slice(segment.layer_start, segment.layer_end)
            assert harness.engine.kv_cache[layers, :, list(segment.block_ids)].isfinite().all()
    harness.post(Release("h"))
    harness.turn()
    harness.assert_at_rest()


def test_bfloat16_on_a_measured_pool(model_dir: Path) -> None:
    """Alone on its GPU: what others take meanwhile is missing here."""
    settings = {"dtype": "auto", "num_blocks": None, "gpu_memory_utilization": 0.5, "prefill_graph_tokens": 256}
    harness = make_gpu_harness(model_dir, **settings)
    assert harness.engine.layout.dtype == "bfloat16"
    total = torch.cuda.get_device_properties(CUDA).total_memory
    size = harness.engine.kv_cache.numel() * 2
    assert 0.3 * total < size < 0.5 * total
    free, _ = torch.cuda.mem_get_info(CUDA)
    assert free > 0.45 * total
    tokens = harness.generate(*(greedy(f"r{n}", random_prompt(50, seed=n), 30) for n in range(5)))
    assert all(len(generated) == 30 for generated in tokens.values())
    harness.assert_at_rest()


def test_too_little_memory_says_what_to_change(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.gpu_memory_utilization: .* raise it"):
        make_gpu_harness(model_dir, num_blocks=None, gpu_memory_utilization=1e-6)
    with pytest.raises(ConfigError, match=r"engine\.num_blocks: a KV cache of 100000000 blocks"):
        make_gpu_harness(model_dir, num_blocks=100_000_000)
