"""Choices of one prompt as forks: blocks shared while they run, the last one copied before it is written to."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from baton.common.sampling import SamplingParams
from baton.engine.ports import Abort
from baton.engine.request import Request
from tests.support.engine_harness import Harness, make_harness, make_request, random_prompt
from tests.support.tiny_model import make_tiny_llama

BLOCK = 16


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2)


def choice(number: int, prompt: list[int], max_tokens: int = 24, fork_of: str = "c0") -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=9, choice=number, frequency_penalty=0.5)
    return make_request(f"c{number}", prompt, sampling, fork_of=fork_of if number else "")


@cache
def alone(model_dir: Path, number: int, length: int) -> list[int]:
    """Tokens of a choice of a random prompt; not to be changed."""
    request = choice(number, random_prompt(length), fork_of="")
    return make_harness(model_dir).generate(request)[request.request_id]


def begin(harness: Harness, request: Request, num_tokens: int = 1) -> None:
    harness.add(request)
    harness.run(until=lambda: len(harness.ports.tokens[request.request_id]) >= num_tokens)


@pytest.mark.parametrize(
    ("length", "prefix_cache", "overlap"),
    [
        (1, False, False),
        (2, True, True),
        (16, False, True),
        (16, True, False),
        (17, False, False),
        (17, True, True),
        (31, False, True),
        (40, True, False),
    ],
)
def test_forks_draw_what_they_would_alone(model_dir: Path, length: int, prefix_cache: bool, overlap: bool) -> None:
    """Fresh blocks hold NaN here, so a block that is not copied would show."""
    prompt = random_prompt(length)
    expected = [alone(model_dir, number, length) for number in range(4)]
    assert len({tuple(tokens) for tokens in expected}) == 4
    harness = make_harness(model_dir, prefix_cache=prefix_cache, overlap=overlap)
    requests = [choice(number, prompt) for number in range(4)]
    begin(harness, requests[0], num_tokens=3)
    harness.add(*requests[1:])
    harness.run()
    assert [harness.ports.tokens[request.request_id] for request in requests] == expected
    assert [request.num_cached_tokens for request in requests] == [0, *[length - 1] * 3]
    assert sum(report.num_prefill_tokens for report in harness.ports.reports) == length + 3
    harness.assert_at_rest()


@pytest.mark.parametrize("length", [33, 40, 48])
def test_only_the_last_block_is_copied(model_dir: Path, length: int) -> None:
    harness = make_harness(model_dir, prefix_cache=False)
    prompt = random_prompt(length)
    parent = choice(0, prompt)
    begin(harness, parent)
    child = choice(1, prompt)
    harness.add(child)
    harness.turn()
    full = (length - 1) // BLOCK
    assert child.block_table[:full] == parent.block_table[:full]
    assert not set(child.block_table[full:]) & set(parent.block_table)
    assert harness.blocks.running == len({*parent.block_table, *child.block_table})
    harness.run()
    harness.assert_at_rest()


@pytest.mark.parametrize("leaver", ["c0", "c1", "c2"])
def test_whoever_leaves_first_takes_nothing_from_the_others(model_dir: Path, leaver: str) -> None:
    prompt = random_prompt(40)
    expected = {f"c{number}": alone(model_dir, number, 40) for number in range(3)}
    harness = make_harness(model_dir, num_blocks=16)
    requests = [choice(number, prompt) for number in range(3)]
    begin(harness, requests[0])
    harness.add(*requests[1:])
    harness.turn()
    harness.post(Abort(leaver))
    harness.turn()
    harness.add(make_request("other", random_prompt(60, seed=5), SamplingParams(max_tokens=30, seed=1)))
    harness.run()
    for name, tokens in expected.items():
        got = harness.ports.tokens[name]
        assert got == (tokens[: len(got)] if name == leaver else tokens), name
    harness.assert_at_rest()


def test_a_fork_of_a_fork_and_one_that_comes_late(model_dir: Path) -> None:
    """By then the parent has filled and registered the block in which the prompt ends."""
    prompt = random_prompt(40)
    harness = make_harness(model_dir)
    parent, child, grandchild = choice(0, prompt, 60), choice(1, prompt), choice(2, prompt, fork_of="c1")
    begin(harness, parent, num_tokens=30)
    begin(harness, child, num_tokens=12)
    begin(harness, grandchild)
    harness.run()
    for request in (child, grandchild):
        assert request.num_cached_tokens == 39
        name = request.request_id
        assert harness.ports.tokens[name] == alone(model_dir, int(name[1:]), 40)
    again = harness.generate(
        make_request("again", [*prompt, *harness.ports.tokens["c0"]], SamplingParams(max_tokens=4))
    )
    assert len(again["again"]) == 4
    harness.assert_at_rest()


@pytest.mark.parametrize("reason", ["unknown", "ended", "another prompt", "prompt logprobs"])
def test_what_cannot_be_forked_is_computed(model_dir: Path, reason: str) -> None:
    prompt = random_prompt(40)
    harness = make_harness(model_dir, prefix_cache=False)
    begin(harness, choice(0, random_prompt(40, seed=8) if reason == "another prompt" else prompt))
    if reason == "ended":
        harness.run()
    child = choice(1, prompt, fork_of="nobody" if reason == "unknown" else "c0")
    if reason == "prompt logprobs":
        sampling = SamplingParams(max_tokens=24, seed=9, choice=1, frequency_penalty=0.5, prompt_logprobs=0)
        child = make_request("c1", prompt, sampling, fork_of="c0")
    tokens = harness.generate(child)["c1"]
    assert child.num_cached_tokens == 0
    assert tokens == alone(model_dir, 1, 40)


def test_forks_wait_for_room(model_dir: Path) -> None:
    """16 blocks: the parent may come to hold 5, each fork 3 of its own beside what it shares."""
    prompt = random_prompt(40)
    harness = make_harness(model_dir, num_blocks=16)
    requests = [choice(number, prompt, max_tokens=40) for number in range(8)]
    begin(harness, requests[0])
    harness.add(*requests[1:])
    harness.turn()
    assert 0 < harness.engine.stats().num_waiting < 7
    harness.run()
    assert [len(harness.ports.tokens[f"c{number}"]) for number in range(8)] == [40] * 8
    assert not harness.ports.failures
    harness.assert_at_rest()
