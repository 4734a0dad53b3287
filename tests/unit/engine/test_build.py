"""From configuration to engine: resolved values, and errors that say what to change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from baton.common.clock import ManualClock
from baton.common.config import EngineConfig, TransferConfig
from baton.common.errors import ConfigError
from baton.engine.build import build_engine, resolve_dtype
from baton.engine.loop import Engine
from baton.engine.pool_size import CPU_CACHE_BYTES, connection_bytes
from baton.engine.request import Request
from baton.engine.warm_up import decode_sizes, harmless_batch, warm_up
from tests.support.engine_harness import RecordingPorts, greedy, make_harness, random_prompt
from tests.support.tiny_model import make_tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2)


def build(model_dir: Path, random_weights: bool = False, **settings: object) -> Engine:
    config = EngineConfig.model_validate(settings)
    ports = RecordingPorts()
    return build_engine(config, TransferConfig(), model_dir, CPU, ports, ManualClock(), random_weights=random_weights)


def test_defaults_on_a_cpu(model_dir: Path) -> None:
    engine = build(model_dir)
    assert engine.layout.dtype == "float32"
    assert engine.max_model_len == 512
    assert engine.vocab_size == 258
    assert engine.kv_cache.shape == (3, 2, 64 * 256 // 16, 16, 2, 16)
    assert engine.stats().blocks.free == 1024
    assert engine.kv_cache.numel() * 4 <= CPU_CACHE_BYTES


def test_auto_dtype() -> None:
    assert resolve_dtype("auto", torch.device("cuda")) == "bfloat16"
    assert resolve_dtype("auto", CPU) == "float32"
    assert resolve_dtype("float16", CPU) == "float16"


def test_a_length_beyond_the_model_is_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="600 is more than the model's 512") as error:
        build(model_dir, max_model_len=600)
    assert error.value.key == "engine.max_model_len"


def test_a_pool_without_room_for_one_sequence_is_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs 32 KV blocks .* there are 31: lower engine.max_model_len to 496"):
        build(model_dir, num_blocks=31)
    assert build(model_dir, num_blocks=31, max_model_len=496).stats().blocks.total == 31


def test_the_cpu_default_is_bounded(tmp_path: Path) -> None:
    """A model with large blocks and a long context is told to limit its length."""
    shape = {"num_key_value_heads": 4, "max_position_embeddings": 131072, "num_hidden_layers": 8}
    model_dir = make_tiny_llama(tmp_path, **shape)
    with pytest.raises(ConfigError, match=r"lower engine\.max_model_len"):
        build(model_dir)
    assert build(model_dir, max_model_len=1024).stats().blocks.total == 1024


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(model_dir: Path, dtype: str) -> None:
    harness = make_harness(model_dir, dtype=dtype, max_num_batched_tokens=16)
    assert len(set(harness.generate(greedy("a", random_prompt(40), 30))["a"])) > 3
    harness.assert_at_rest()


def test_random_weights_need_no_checkpoint(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="neither"):
        build(tmp_path)
    engine = build(tmp_path, random_weights=True)
    assert engine.layout.model_hash == build(tmp_path, random_weights=True).layout.model_hash
    assert engine.layout.model_hash != build(model_dir).layout.model_hash
    assert engine.layout.model_hash == build(tmp_path, load_format="random").layout.model_hash


def test_warming_up_leaves_no_trace(model_dir: Path) -> None:
    """The same on a CPU, where nothing has to be compiled: it runs, and the cache is as before."""
    harness = make_harness(model_dir)
    warm_up(harness.engine._runner, 5)
    assert not harness.engine.kv_cache.any()
    assert [decode_sizes(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]


def test_profiling_draws_plainly_and_in_the_way_that_takes_the_most_memory(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What requests with penalties keep is there when the forward pass is measured."""
    runner = build(model_dir)._runner
    forward, draw = runner.model.forward, runner.sampler.sample
    seen: list[object] = []

    def sample(logits: torch.Tensor, requests: Sequence[Request], positions: npt.NDArray[np.int64]) -> torch.Tensor:
        seen.append((len({id(request) for request in requests}), requests[0].sampling.has_penalties))
        return draw(logits, requests, positions)

    def counted(*args: object) -> torch.Tensor:
        seen.append("forward")
        return forward(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(runner.sampler, "sample", sample)
    monkeypatch.setattr(runner.model, "forward", counted)
    runner.profile(harmless_batch(3, num_prefills=1))
    assert seen == [(3, True), "forward", (3, False), (3, True)]
    runner.profile(harmless_batch(0, num_prefills=1))
    assert seen[4:] == ["forward"]


def test_memory_for_connections_grows_with_pairs_slots_and_channels() -> None:
    assert connection_bytes(TransferConfig(num_pairs=0)) == 0
    one, two = (connection_bytes(TransferConfig(num_pairs=pairs, window=4, slot_bytes=1 << 25)) for pairs in (1, 2))
    assert two - one > 4 * (1 << 25)
    assert connection_bytes(TransferConfig(num_pairs=2, max_ctas=16)) > two
