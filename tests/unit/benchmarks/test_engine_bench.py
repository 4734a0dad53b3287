"""The engine bench: floors by hand, fixed workloads, and a driven engine that runs what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from baton.common.config import EngineConfig
from baton.common.errors import ConfigError
from baton.engine.models.config import parse_model_config
from benchmarks.engine.drive import DrivenEngine
from benchmarks.engine.floors import Ceilings, Floors
from benchmarks.engine.servable import write_servable
from benchmarks.engine.session import Session
from benchmarks.engine.shapes import SHAPES, write_shape
from benchmarks.engine.workloads import Job, fixed, mixed, spread

H200 = Ceilings(read=4344e9, matmul=783e12)


def test_floors_of_an_8b_model() -> None:
    floors = Floors(parse_model_config(SHAPES["llama-3.1-8b"]), 2, H200)
    assert floors.weight_bytes == pytest.approx(15.0e9, rel=0.01)
    milliseconds = [1e3 * floors.decode(batch, 2048) for batch in (1, 8, 64, 128, 256)]
    assert milliseconds == pytest.approx([3.52, 3.97, 7.6, 11.7, 21.2], rel=0.03)
    assert 1e3 * floors.prefill(8192) == pytest.approx(168.5, rel=0.01)


def test_a_step_is_never_below_its_reads() -> None:
    floors = Floors(parse_model_config(SHAPES["tiny"]), 4, Ceilings(read=1e6, matmul=1e15))
    kv_bytes = 2 * 2 * 32 * 4 * 3 * 100  # K and V, layers, values of a token, bytes, sequences, context
    assert floors.decode(3, 100) == pytest.approx((floors.weight_bytes + kv_bytes) / 1e6)


def test_workloads_are_always_the_same() -> None:
    assert (len(mixed()), sum(job.num_out for job in mixed())) == (256, 144160)
    assert min(min(job.num_in, job.num_out) for job in mixed()) >= 100
    assert fixed() == [Job(1024, 128)] * 512
    assert max(job.num_out for job in spread()) <= 1536
    assert sum(job.num_out for job in spread()) / 512 == pytest.approx(128, rel=0.1)
    assert spread() == spread()


@pytest.fixture
def engine(tmp_path: Path) -> DrivenEngine:
    torch.set_num_threads(1)
    config = EngineConfig(max_num_seqs=8, max_model_len=256, num_blocks=64, prefix_cache=False, overlap=True)
    return DrivenEngine(config, write_shape("tiny", tmp_path), torch.device("cpu"))


def test_a_driven_engine_runs_what_it_is_told(engine: DrivenEngine) -> None:
    _, num_out = engine.run([Job(10, 5), Job(30, 7), Job(50, 1)])
    assert num_out == 13
    assert 0 < engine.first_token_seconds(50) < 60
    times = engine.decode(4, 100, num_steps=10)
    assert 0 < times.seconds < 60
    assert times.device_seconds is None
    assert engine.engine.stats().blocks.free == 64


def test_what_does_not_fit_is_a_row_that_says_why(engine: DrivenEngine) -> None:
    with pytest.raises(RuntimeError, match="blocks are not free"):
        engine.decode(8, 200, num_steps=10)
    floors = Floors(parse_model_config(SHAPES["tiny"]), 4, H200)
    rows = list(Session(engine, floors, engine.max_tokens).prefill())
    assert [row.work for row in rows if row.value is None] == [f"prefill of {n}" for n in (512, 2048, 8192, 32768)]
    assert all("more than the maximum of 256" in str(row.details["failed"]) for row in rows)
    assert engine.run([Job(10, 5)])[1] == 5


def test_every_id_of_a_shape_has_a_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_servable("llama-3.1-8b", tmp_path / "new") / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SHAPES["llama-3.1-8b"]["vocab_size"]
    assert tokenizer.decode([256, 128255]) == " w256 w128255"
    assert tokenizer.decode(tokenizer.encode("naïve\n").ids) == "naïve\n"
    with pytest.raises(ConfigError, match="none of llama"):
        write_servable("gpt-5", tmp_path)
