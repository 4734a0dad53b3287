"""Short steps on padded buffers, which graphs capture: the tokens and logits of the pass that they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from baton.common.clock import ManualClock
from baton.common.config import EngineConfig, TransferConfig
from baton.common.sampling import SamplingParams
from baton.engine.attention import torch_reference
from baton.engine.batch import Batch, PrefillSegment, ScheduledStep, build_batch
from baton.engine.build import build_engine
from baton.engine.cuda.graph_pool import Compute
from baton.engine.cuda.prefill_graphs import PrefillGraphs
from baton.engine.models.decoder import AfterLayer
from baton.engine.padded_layout import MAX_PREFILLS, Bucket, Buckets, PaddedLayout
from baton.engine.padded_steps import PaddedSteps
from baton.engine.request import Request
from baton.engine.runner import Runner
from baton.engine.sampler import NOT_FINITE
from tests.support.engine_harness import (
    Harness,
    RecordingPorts,
    greedy,
    make_harness,
    make_request,
    random_prompt,
    seeded,
)
from tests.support.tiny_model import make_tiny_llama

LIMIT = 160


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2)


def greedy_tokens(logits: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(torch.where(logits.amax(-1).isfinite(), logits.argmax(-1), NOT_FINITE))


class Recomputing:
    """In place of `Captured`: replaying calls what was captured."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self.output = compute(lambda: None)

    def replay(self, after: Callable[[int], None]) -> None:
        index = itertools.count()
        self._compute(lambda: after(next(index)))
        after(next(index))


class RecomputingPool:
    """In place of a `GraphPool`."""

    def capture(self, compute: Compute) -> Recomputing:
        return Recomputing(compute)


class Uncaptured(PrefillGraphs):
    """Computes what the graphs would be captured of. Keeps what it launched."""

    def __init__(self, runner: Runner, max_num_seqs: int, max_blocks: int, limit: int = LIMIT) -> None:
        steps = PaddedSteps(runner, greedy_tokens, limit, max_num_seqs, max_blocks)
        super().__init__(steps, RecomputingPool(), runner.layout.num_layers)  # type: ignore[arg-type]
        self.prepare()
        self.launched: list[tuple[int, int]] = []
        self.logits: list[torch.Tensor] = []

    def launch(self, step: ScheduledStep, batch: Batch, after_layer: AfterLayer = lambda _: None) -> int:
        num_drawn = super().launch(step, batch, after_layer)
        self.launched.append((len(step.decodes), step.num_prefill_tokens))
        self.logits.append(self._captured[self._steps.fill(step, batch)].output[:num_drawn].clone())
        return num_drawn


def padded_harness(model_dir: Path, limit: int = LIMIT, **settings: Any) -> tuple[Harness, Uncaptured]:
    harness = make_harness(model_dir, **settings)
    runner = harness.engine._runner
    path = Uncaptured(runner, settings.get("max_num_seqs", 64), 256 // 16, limit)
    runner.prefill_path = path
    return harness, path


def mixed_requests() -> list[Request]:
    """Lengths at the edges of blocks, prompts that begin alike, draws of both kinds, more prompts than fit a step."""
    found = [greedy(f"g{n}", random_prompt(n, seed=n), 5 + n % 30) for n in (1, 15, 16, 17, 32, 33, 100)]
    found += [greedy(f"p{n}", random_prompt(48) + random_prompt(n, seed=n), 9) for n in (1, 16, 30)]
    found += [seeded(f"s{n}", random_prompt(n, seed=n), 25, seed=n, top_p=0.9, top_k=50) for n in (3, 17, 64)]
    found += [greedy(f"m{n}", random_prompt(1 + n % 3, seed=n), 12) for n in range(2 * MAX_PREFILLS)]
    return [*found, greedy("one", random_prompt(9), 1), greedy("last", random_prompt(97, seed=1), 2)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_seqs": 5, "max_num_batched_tokens": 40},
        {"overlap": True, "max_num_batched_tokens": 50},
        {"overlap": True, "prefix_cache": False, "num_blocks": 30, "max_num_seqs": 7},
    ],
    ids=str,
)
def test_the_same_tokens(model_dir: Path, settings: dict[str, Any]) -> None:
    eager = make_harness(model_dir, **settings)
    expected = eager.generate(*mixed_requests())
    harness, path = padded_harness(model_dir, **settings)
    assert harness.generate(*mixed_requests()) == expected
    assert harness.ports.finish_reasons == eager.ports.finish_reasons
    assert any(decodes and prefills for decodes, prefills in path.launched)
    assert all(decodes + prefills <= LIMIT for decodes, prefills in path.launched)
    harness.assert_at_rest()
    again = [greedy("again", random_prompt(48) + random_prompt(30, seed=30), 9)]
    assert harness.generate(*again)["again"] == expected["p30"]


@pytest.mark.parametrize(
    ("decodes", "prefills"),
    [
        ([], [(0, 1)]),
        ([], [(0, 16)]),
        ([], [(16, 17)]),
        ([], [(32, 64), (0, 5), (48, 49)]),
        ([17, 1, 40], [(0, 33)]),
        ([16] * 9, [(64, 70), (0, 1)]),
    ],
    ids=["one token", "a block", "first of a block", "several", "mixed", "mixed with prefixes"],
)
def test_bit_equal_logits(
    model_dir: Path, decodes: list[int], prefills: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`decodes`: context lengths. `prefills`: [start, end). The same state of the cache before both.

    Products row by row, and decodes always as a batch: a BLAS takes other sums for other numbers of rows.
    """
    harness, path = padded_harness(model_dir)
    monkeypatch.setattr(functional, "linear", product_by_rows)
    monkeypatch.setattr(torch_reference, "_PADDING_PER_SEQ", 10**6)
    runner = harness.engine._runner
    step = make_step(decodes, prefills)
    runner.kv_cache.normal_(generator=torch.Generator().manual_seed(1))
    before = runner.kv_cache.clone()
    with torch.inference_mode():
        batch = build_batch(step, 16)
        _, logits = runner._forward(batch, None)
        tokens = runner._draw(logits, step.sampled(), batch.draw_positions)
        written = runner.kv_cache.clone()
        runner.kv_cache.copy_(before)
        assert path.takes(step)
        num_drawn = path.launch(step, batch)
    assert num_drawn == len(decodes) + len(prefills)
    assert torch.equal(runner.draws[:num_drawn], tokens)
    torch.testing.assert_close(path.logits[0], logits, rtol=0, atol=0)
    torch.testing.assert_close(runner.kv_cache, written, rtol=0, atol=0)


def product_by_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    assert bias is None
    return torch.stack([weight @ row for row in x])


def make_step(decodes: list[int], prefills: list[tuple[int, int]]) -> ScheduledStep:
    """Requests with tables of their own, the blocks in no order."""
    free = np.random.default_rng(0).permutation(64).tolist()

    def request(name: str, length: int, computed: int) -> Request:
        made = greedy(name, random_prompt(length, seed=length))
        made.block_table = [free.pop() for _ in range(-(-length // 16))]
        made.num_computed_tokens = computed
        return made

    segments = [(request(f"p{i}", end, start), start, end) for i, (start, end) in enumerate(prefills)]
    return ScheduledStep(
        tuple(request(f"d{i}", context, context - 1) for i, context in enumerate(decodes)),
        tuple(PrefillSegment(*segment) for segment in segments),
    )


def test_steps_that_are_computed_otherwise(model_dir: Path) -> None:
    _, path = padded_harness(model_dir, limit=100, max_num_seqs=40)
    assert path.takes(make_step([5], [(0, 99)]))
    assert not path.takes(make_step([5], [(0, 100)]))
    assert not path.takes(make_step([5, 6], []))
    assert path.takes(make_step([], [(0, 1)] * MAX_PREFILLS))
    assert not path.takes(make_step([], [(0, 1)] * (MAX_PREFILLS + 1)))
    for settings in ({"frequency_penalty": 0.5}, {"logprobs": 1}, {"prompt_logprobs": 0}):
        request = make_request("r", random_prompt(9), SamplingParams(max_tokens=5, **settings))
        assert not path.takes(ScheduledStep(prefills=(PrefillSegment(request, 0, 9),)))


def test_hand_overs_are_announced_at_the_cuts(model_dir: Path) -> None:
    def segments_of(harness: Harness) -> list[float]:
        harness.add(greedy("h", random_prompt(70), hand_over=True))
        harness.run()
        (done,) = harness.ports.prefills
        assert {(s.block_start, s.block_end) for s in harness.ports.segments} == {(0, 5)}
        layers.append([(s.layer_start, s.layer_end) for s in harness.ports.segments])
        kv = sum(
            harness.engine.kv_cache[s.layer_start : s.layer_end, :, list(s.block_ids[:-1])].double().sum().item()
            for s in harness.ports.segments
        )
        return [done.first_token, round(kv, 4)]

    layers: list[list[tuple[int, int]]] = []
    harness, path = padded_harness(model_dir)
    assert segments_of(harness) == segments_of(make_harness(model_dir))
    at_cuts, by_group = layers
    assert len(by_group) > 1
    assert [end for _, end in at_cuts] == [*path.cuts]
    assert path.launched == [(0, 70)]


def test_layers_are_told_when_they_are_launched_and_not_behind_the_step(model_dir: Path) -> None:
    harness, path = padded_harness(model_dir)
    runner = harness.engine._runner
    step = make_step([7], [(0, 90)])
    written: list[tuple[int, list[bool]]] = []

    def after_layer(layer: int) -> None:
        written.append((layer + 1, [bool((layer_kv != 0.5).any()) for layer_kv in runner.kv_cache]))

    runner.kv_cache.fill_(0.5)
    with torch.inference_mode():
        path.launch(step, build_batch(step, 16), after_layer)
    num_layers = len(runner.kv_cache)
    assert written == [(cut, [layer < cut for layer in range(num_layers)]) for cut in path.cuts]
    assert path.cuts[-1] == num_layers > path.cuts[0]


def test_buckets_hold_what_they_say() -> None:
    buckets = Buckets(1000, 256)
    assert buckets.largest_first[0] == Bucket(1000, 256, MAX_PREFILLS)
    assert buckets.find(300, 0, 1) == Bucket(320, 0, MAX_PREFILLS)
    assert buckets.find(300, 9, 1) == Bucket(384, 32, MAX_PREFILLS)
    assert buckets.find(300, 33, 1) == Bucket(384, 256, MAX_PREFILLS)
    assert buckets.find(300, 257, 1) is None
    assert buckets.find(1, 0, 1) == Bucket(64, 0, MAX_PREFILLS)
    assert buckets.find(1000, 255, MAX_PREFILLS) == Bucket(1000, 256, MAX_PREFILLS)
    assert buckets.find(1001, 0, 1) is None
    assert buckets.find(20, 0, MAX_PREFILLS + 1) is None
    assert {bucket.num_tokens for bucket in Buckets(7, 3).largest_first} == {7}
    for bucket in buckets.largest_first:
        assert bucket.num_decodes in (0, 32, min(256, bucket.num_tokens))
    assert len(buckets.largest_first) == len(set(Buckets(1000, 20).largest_first)) + 8


def test_every_array_lies_where_wide_loads_can_read_it() -> None:
    for bucket in (Bucket(64, 0, 5), Bucket(99, 7, 3), Bucket(128, 64, 16)):
        layout = PaddedLayout(bucket, 64)
        words = torch.zeros(layout.num_words, dtype=torch.int64)
        fields = layout.fields(words, torch.int32)
        starts = [getattr(fields, name).storage_offset() * getattr(fields, name).itemsize for name in fields.__slots__]
        assert all(start % 16 == 0 for start in starts)
        names = ("input_ids", "positions", "slot_mapping", "sample_rows", "draw_rows", "cu_seqlens_q", "context_lens")
        for value, name in enumerate(names, 1):
            getattr(fields, name).fill_(value)
        assert [getattr(fields, name).unique().tolist() for name in names if len(getattr(fields, name))] == [
            [value] for value, name in enumerate(names, 1) if len(getattr(fields, name))
        ]


def test_an_empty_step_stores_nothing(model_dir: Path) -> None:
    harness, path = padded_harness(model_dir)
    runner = harness.engine._runner
    steps = path._steps
    with torch.inference_mode():
        path.launch(*((step := make_step([7], [(0, 90)])), build_batch(step, 16)))
        runner.kv_cache.fill_(0.5)
        for bucket in steps.buckets:
            steps.clear(bucket)
            steps.compute(bucket)
    assert (runner.kv_cache == 0.5).all()


def test_a_model_whose_logits_are_not_finite_fails_its_request(model_dir: Path) -> None:
    ports, clock = RecordingPorts(), ManualClock()
    config = EngineConfig.model_validate({"num_blocks": 64, "max_model_len": 256})
    engine = build_engine(config, TransferConfig(), model_dir, torch.device("cpu"), ports, clock)
    engine._runner.prefill_path = Uncaptured(engine._runner, 64, 16)
    harness = Harness(engine, ports, clock)
    harness.add(greedy("bad", random_prompt(20), 9), greedy("good", random_prompt(30, seed=1), 9))
    engine._runner.model.embed[random_prompt(20)[3]] = torch.nan
    harness.run()
    assert [failure.request_id for failure in ports.failures if failure.request_id == "bad"] == ["bad"]
