"""A prompt prefilled on one engine and decoded on another gives the tokens that one engine alone gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.common.sampling import SamplingParams
from baton.engine.ports import Admission, Release, Reservation
from baton.engine.request import Request
from baton.engine.segments import split_layers
from tests.support.engine_harness import Harness, greedy, make_harness, make_request, random_prompt, seeded
from tests.support.tiny_model import make_tiny_llama

LAYERS = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2)


def copy_segments(source: Harness, target: Harness, name: str, reservation: Reservation) -> None:
    """Move exactly what was announced, as a transfer would."""
    for segment in source.ports.segments:
        if segment.request_id == name:
            layers = slice(segment.layer_start, segment.layer_end)
            blocks = list(reservation.block_table[segment.block_start : segment.block_end])
            target.engine.kv_cache[layers, :, blocks] = source.engine.kv_cache[layers, :, list(segment.block_ids)]


def hand_over(prefill: Harness, decode: Harness, request: Request, max_total_tokens: int) -> list[int]:
    """The whole path of one request; returns its tokens."""
    name, prompt = request.request_id, list(request.token_ids)
    reservation = decode.reserve(f"lease-{name}", prompt, max_total_tokens)
    prefill.add(
        make_request(name, prompt, request.sampling, hand_over=True, first_block_to_send=reservation.first_block)
    )
    prefill.run()
    done = next(done for done in prefill.ports.prefills if done.request_id == name)
    assert done.num_tokens == len(prompt)
    copy_segments(prefill, decode, name, reservation)
    prefill.post(Release(name))
    prefill.turn()
    prefill.assert_at_rest()
    decode.ports.to_admit.append(Admission(f"lease-{name}", request, done.first_token))
    decode.engine.wake()
    decode.run()
    assert decode.ports.first_position[name] == request.num_emitted + 1
    assert decode.ports.events_of(name)[:2] == ["admitted", "second_token"]
    return [done.first_token, *decode.ports.tokens[name]]


@pytest.mark.parametrize(
    ("length", "budget", "make"),
    [
        (1, 2048, greedy),
        (15, 13, seeded),
        (16, 2048, seeded),
        (16, 13, greedy),
        (17, 13, greedy),
        (48, 13, seeded),
        (100, 13, greedy),
        (100, 2048, seeded),
    ],
)
def test_equals_local(model_dir: Path, length: int, budget: int, make: Callable[..., Request]) -> None:
    prompt = random_prompt(length)
    local = make_harness(model_dir).generate(make("r", prompt, 40))["r"]
    prefill = make_harness(model_dir, max_num_batched_tokens=budget)
    decode = make_harness(model_dir)
    assert hand_over(prefill, decode, make("r", prompt, 40), length + 40) == local
    decode.assert_at_rest()


def announced(harness: Harness) -> list[tuple[int, int]]:
    return [
        (layer, block)
        for segment in harness.ports.segments
        for layer in range(segment.layer_start, segment.layer_end)
        for block in range(segment.block_start, segment.block_end)
    ]


@pytest.mark.parametrize("layer_groups", [1, 2, 3, 8])
def test_every_block_of_every_layer_is_announced_once(model_dir: Path, layer_groups: int) -> None:
    harness = make_harness(model_dir, layer_groups=layer_groups, max_num_batched_tokens=21)
    harness.add(greedy("h", random_prompt(70), hand_over=True), greedy("local", random_prompt(50, seed=1), 10))
    harness.run()
    pairs = announced(harness)
    assert sorted(pairs) == [(layer, block) for layer in range(LAYERS) for block in range(5)]
    for segment in harness.ports.segments:
        assert len(segment.block_ids) == segment.block_end - segment.block_start
    assert {s.layer_end for s in harness.ports.segments} == {end for _, end in split_layers(LAYERS, layer_groups)}
    assert len(harness.ports.segments) > layer_groups


def test_a_segment_is_written_when_it_is_announced(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = make_harness(model_dir, layer_groups=3, max_num_batched_tokens=21)
    unfinished: list[int] = []

    def on_layer_group(segment: object) -> None:
        harness.ports.segments.append(segment)  # type: ignore[arg-type]
        layers = slice(segment.layer_start, segment.layer_end)  # type: ignore[attr-defined]
        kv = harness.engine.kv_cache[layers, :, list(segment.block_ids)]  # type: ignore[attr-defined]
        if segment.block_end * 16 <= 70:  # type: ignore[attr-defined]
            assert kv.isfinite().all()
        later = harness.engine.kv_cache[layers.stop :, :, list(segment.block_ids)]  # type: ignore[attr-defined]
        unfinished.append(int(later.isnan().sum()))

    monkeypatch.setattr(harness.ports, "on_layer_group", on_layer_group)
    harness.add(greedy("h", random_prompt(70), hand_over=True))
    harness.run()
    assert len(announced(harness)) == LAYERS * 5
    assert max(unfinished) > 0, "segments were announced only after the last layer"


def test_cached_blocks_are_shared_and_not_received(model_dir: Path) -> None:
    prefill, decode = make_harness(model_dir), make_harness(model_dir)
    prompt = random_prompt(70)
    local = make_harness(model_dir).generate(greedy("r", prompt, 20))["r"]
    decode.generate(greedy("warm", prompt[:40], 4))
    assert hand_over(prefill, decode, greedy("r", prompt, 20), 90) == local
    assert sorted(announced(prefill)) == [(layer, block) for layer in range(LAYERS) for block in range(2, 5)]
    # The received blocks can be found as well; a prompt of full blocks only then needs nothing at all.
    reservation = decode.reserve("again", prompt[:64], 100)
    assert reservation.first_block == 4
    assert len(reservation.block_table) == 4
    decode.post(Release("again"))
    decode.turn()
    decode.assert_at_rest()


def test_what_prefill_has_cached_is_sent_all_the_same(model_dir: Path) -> None:
    prefill, decode = make_harness(model_dir), make_harness(model_dir)
    prompt = random_prompt(64)
    local = make_harness(model_dir).generate(greedy("r", prompt, 20))["r"]
    prefill.generate(greedy("warm", prompt, 4))
    request = greedy("r", prompt, 20)
    assert hand_over(prefill, decode, request, 84) == local
    assert sorted(announced(prefill)) == [(layer, block) for layer in range(LAYERS) for block in range(4)]


def test_a_fully_cached_prompt_is_admitted_without_a_single_block(model_dir: Path) -> None:
    prefill, decode = make_harness(model_dir), make_harness(model_dir)
    prompt = random_prompt(48)
    local = make_harness(model_dir).generate(greedy("r", prompt, 20))["r"]
    decode.generate(greedy("warm", prompt, 4))
    assert hand_over(prefill, decode, greedy("r", prompt, 20), 68) == local
    assert announced(prefill) == []


def test_local_and_handed_over_requests_share_batches(model_dir: Path) -> None:
    prefill, decode = make_harness(model_dir), make_harness(model_dir, max_num_batched_tokens=16)
    prompts = {name: random_prompt(30 + 10 * n, seed=n) for n, name in enumerate("abc")}
    local = {name: make_harness(model_dir).generate(seeded(name, p, 30))[name] for name, p in prompts.items()}
    decode.add(seeded("a", prompts["a"], 30))
    decode.turn()
    assert hand_over(prefill, decode, seeded("b", prompts["b"], 30), 80) == local["b"]
    decode.add(seeded("c", prompts["c"], 30))
    decode.run()
    assert decode.ports.tokens["a"] == local["a"]
    assert decode.ports.tokens["c"] == local["c"]


def test_a_resubmission_is_handed_over_with_its_position(model_dir: Path) -> None:
    prompt = random_prompt(30)
    whole = make_harness(model_dir).generate(seeded("r", prompt, 40))["r"]
    request = seeded("r", prompt + whole[:9], 31)
    request.num_emitted = 9
    assert hand_over(make_harness(model_dir), make_harness(model_dir), request, 70) == whole[9:]


def test_an_admission_that_is_finished_already_ends_at_once(model_dir: Path) -> None:
    decode = make_harness(model_dir)
    decode.reserve("lease", random_prompt(20), 21)
    decode.post(Admission("lease", greedy("r", random_prompt(20), 1), 5))
    assert not decode.turn()
    assert decode.ports.finish_reasons == {"r": "length"}
    assert decode.ports.tokens["r"] == []
    decode.assert_at_rest()


def test_an_admitted_request_may_stop_or_be_aborted(model_dir: Path) -> None:
    from_start = make_harness(model_dir).generate(greedy("r", random_prompt(20), 12))["r"]
    stop = next(token for token in from_start[2:] if token not in from_start[:2])
    sampling = SamplingParams(max_tokens=40, temperature=0.0, stop_token_ids=frozenset({stop}))
    prefill, decode = make_harness(model_dir), make_harness(model_dir)
    tokens = hand_over(prefill, decode, make_request("r", random_prompt(20), sampling), 60)
    assert tokens == from_start[: from_start.index(stop) + 1]
    assert decode.ports.finish_reasons["r"] == "stop"
    decode.assert_at_rest()
