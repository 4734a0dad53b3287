"""With overlap a step is launched before the tokens of the one before are known: same tokens, and blocks stay put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.common.sampling import SamplingParams
from baton.engine.models.tiny import VOCAB_SIZE
from baton.engine.ports import Abort, Admission, Refusal, Release, Reserve
from baton.engine.request import Request
from tests.support.engine_harness import Harness, greedy, make_harness, make_request, random_prompt, seeded
from tests.support.tiny_model import make_tiny_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2)


@pytest.fixture
def harness(model_dir: Path) -> Harness:
    return make_harness(model_dir, overlap=True, max_num_batched_tokens=24)


def stopping(name: str, prompt: list[int], stop: int, max_tokens: int = 40) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=frozenset({stop}))
    return make_request(name, prompt, sampling)


def mixed_requests(stop: int) -> list[Request]:
    requests = [greedy(f"g{n}", random_prompt(n, seed=n), 5 + n % 30) for n in (1, 16, 33, 70)]
    requests += [seeded(f"s{n}", random_prompt(n, seed=n), 35, seed=n, top_p=0.9, top_k=50) for n in (3, 17, 64)]
    requests += [stopping(f"e{n}", random_prompt(n, seed=n), stop) for n in (5, 20, 48)]
    return [*requests, greedy("one", random_prompt(9), 1), greedy("two", random_prompt(9, seed=2), 2)]


@pytest.mark.parametrize(
    ("settings", "stops_at"),
    [({}, None), ({}, 4), ({"num_blocks": 18, "max_num_seqs": 3}, 5), ({"prefix_cache": False}, 4)],
    ids=str,
)
def test_the_same_tokens(model_dir: Path, settings: dict[str, Any], stops_at: int | None) -> None:
    """`stops_at`: some requests stop at the token that the model gives one of them there."""
    tokens = make_harness(model_dir).generate(greedy("a", random_prompt(20, seed=20), 9))["a"]
    stop = VOCAB_SIZE if stops_at is None else tokens[stops_at]
    plain = make_harness(model_dir, max_num_batched_tokens=24, **settings)
    overlapped = make_harness(model_dir, max_num_batched_tokens=24, overlap=True, **settings)
    assert overlapped.generate(*mixed_requests(stop)) == plain.generate(*mixed_requests(stop))
    assert overlapped.ports.finish_reasons == plain.ports.finish_reasons
    overlapped.assert_at_rest()


def test_a_launch_never_waits_for_the_tokens_before(harness: Harness) -> None:
    """The tokens of a step come out in the turn that launches the next one."""
    request = greedy("a", random_prompt(10), 6)
    harness.add(request)
    harness.turn()
    assert request.num_computed_tokens == 10
    assert not harness.ports.tokens["a"]
    for number in range(1, 6):
        harness.turn()
        assert len(harness.ports.tokens["a"]) == number
        assert request.num_computed_tokens == 10 + number
    harness.turn()
    assert harness.ports.finish_reasons["a"] == "length"
    assert request.num_computed_tokens == 15, "a step too many for a request whose length says when it ends"
    assert not harness.turn()


PENALTIES: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 0.0, "frequency_penalty": 0.7, "presence_penalty": -0.2},
    {"temperature": 1.0, "seed": 3, "repetition_penalty": 0.8, "frequency_penalty": 0.3, "top_p": 0.9},
    {"temperature": 1.0, "seed": 4, "presence_penalty": 1.5, "min_tokens": 9, "stop_token_ids": frozenset({5, 7, 200})},
]


def test_penalties_change_no_token(model_dir: Path) -> None:
    """They count a token that is not read back yet, beside requests without them, chunks and stops."""

    def requests() -> list[Request]:
        found = [
            make_request(f"p{n}", random_prompt(5 + 9 * n, seed=n), SamplingParams(max_tokens=40, **params))
            for n, params in enumerate(PENALTIES)
        ]
        return [*found, greedy("plain", random_prompt(40), 30), seeded("seeded", random_prompt(3), 20)]

    for settings in ({}, {"max_num_seqs": 3, "num_blocks": 20}):
        plain = make_harness(model_dir, max_num_batched_tokens=24, **settings)
        overlapped = make_harness(model_dir, max_num_batched_tokens=24, overlap=True, **settings)
        assert overlapped.generate(*requests()) == plain.generate(*requests())
        assert overlapped.ports.finish_reasons == plain.ports.finish_reasons
        overlapped.assert_at_rest()


def test_a_launch_does_not_wait_for_penalties(harness: Harness) -> None:
    request = make_request("a", random_prompt(10), SamplingParams(max_tokens=6, **PENALTIES[0]))
    harness.add(request)
    harness.turn()
    for number in range(1, 6):
        harness.turn()
        assert len(harness.ports.tokens["a"]) == number
        assert request.num_computed_tokens == 10 + number


def test_a_request_that_stops_runs_one_step_too_far_and_keeps_its_blocks_until_then(model_dir: Path) -> None:
    tokens = make_harness(model_dir).generate(greedy("a", random_prompt(15), 12))["a"]
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    harness = make_harness(model_dir, overlap=True)
    request = stopping("a", random_prompt(15), stop)
    harness.add(request)
    harness.run(until=lambda: "a" in harness.ports.finish_reasons)
    assert request.steps_in_flight == 1
    assert harness.blocks.running == len(request.block_table)
    assert harness.engine.stats().num_running == 0
    assert harness.turn()
    assert harness.ports.tokens["a"] == tokens[: tokens.index(stop) + 1]
    harness.assert_at_rest()


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
def test_an_abort_while_a_step_is_in_flight(harness: Harness, turns: int) -> None:
    request = greedy("a", random_prompt(50), 60)
    harness.add(request, greedy("b", random_prompt(20, seed=1), 20))
    for _ in range(turns):
        harness.turn()
    harness.post(Abort("a"))
    # Everything that is free is asked for: what the step in flight writes must not be among it.
    in_use = set(request.block_table)
    harness.turn()
    emitted = list(harness.ports.tokens["a"])
    reservation = harness.reserve("lease", random_prompt(16, seed=9), 40)
    assert not in_use & set(reservation.block_table) or request.steps_in_flight == 0
    harness.run()
    assert harness.ports.tokens["a"] == emitted
    assert len(harness.ports.tokens["b"]) == 20
    harness.post(Release("lease"))
    harness.turn()
    harness.assert_at_rest()


def test_a_reservation_gets_no_block_that_a_step_in_flight_may_write(model_dir: Path) -> None:
    harness = make_harness(model_dir, overlap=True, num_blocks=16, prefix_cache=False)
    request = greedy("a", random_prompt(100), 100)
    harness.add(request)
    harness.turn()
    taken = set(request.block_table)
    assert len(taken) == 7
    harness.post(Abort("a"))
    replies: list[object] = []
    harness.post(Reserve("lease", random_prompt(160), 160, replies.append))
    harness.turn()
    (refusal,) = replies
    assert isinstance(refusal, Refusal)
    assert request.steps_in_flight == 0
    assert harness.blocks.free == 16
    assert harness.reserve("lease", random_prompt(160), 160)


def test_logits_that_are_not_finite_fail_one_request(harness: Harness) -> None:
    request = greedy("bad", random_prompt(20), 30)
    harness.add(request, greedy("good", random_prompt(20, seed=1), 30))
    harness.run(until=lambda: request.num_computed_tokens == 28)
    harness.engine.kv_cache[:, :, request.block_table[0]] = torch.nan
    harness.run()
    (failure,) = harness.ports.failures
    assert (failure.request_id, failure.code) == ("bad", "internal")
    assert len(harness.ports.tokens["good"]) == 30
    harness.assert_at_rest()


def test_a_launch_that_raises_leaves_the_step_in_flight_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    harness.add(*(greedy(f"r{n}", random_prompt(20, seed=n), 20) for n in range(3)))
    harness.run(until=lambda: len(harness.ports.tokens["r2"]) == 2)
    with monkeypatch.context() as patched:
        patched.setattr(harness.engine._runner, "launch", lambda *_: 1 / 0)
        harness.turn()
    assert {failure.request_id for failure in harness.ports.failures} == {"r0", "r1", "r2"}
    assert harness.turn()
    assert not harness.turn()
    assert "Traceback" in caplog.text
    harness.assert_at_rest()
    harness.ports.reports.clear()
    assert len(harness.generate(greedy("next", random_prompt(9), 4))["next"]) == 4


def test_a_hand_over_between_overlapping_engines(model_dir: Path) -> None:
    prompt = random_prompt(70)
    local = make_harness(model_dir).generate(seeded("r", prompt, 30))["r"]
    prefill = make_harness(model_dir, overlap=True, max_num_batched_tokens=21)
    decode = make_harness(model_dir, overlap=True)
    reservation = decode.reserve("lease", prompt, 100)
    sampling = seeded("r", prompt, 30).sampling
    prefill.add(make_request("r", prompt, sampling, hand_over=True), greedy("other", random_prompt(30), 20))
    prefill.run()
    (done,) = prefill.ports.prefills
    for segment in prefill.ports.segments:
        layers = slice(segment.layer_start, segment.layer_end)
        blocks = list(reservation.block_table[segment.block_start : segment.block_end])
        decode.engine.kv_cache[layers, :, blocks] = prefill.engine.kv_cache[layers, :, list(segment.block_ids)]
    prefill.post(Release("r"))
    prefill.turn()
    prefill.assert_at_rest()
    decode.ports.to_admit.append(Admission("lease", seeded("r", prompt, 30), done.first_token))
    decode.engine.wake()
    decode.run()
    assert [done.first_token, *decode.ports.tokens["r"]] == local
    decode.assert_at_rest()
