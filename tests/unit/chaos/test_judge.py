"""The judge of a chaos run: it must accept what an undisturbed engine says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from baton.chaos.load import Job, Stream
from baton.chaos.plan import ChaosPlan, load_plan
from baton.chaos.reference import Reference
from baton.chaos.run import Result, judge
from tests.support.engine_harness import greedy, make_harness, random_prompt, seeded
from tests.support.tiny_model import make_tiny_llama

PROMPT = random_prompt(40)
PLANS = sorted((Path(__file__).parents[3] / "benchmarks" / "chaos").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("judge") / "tiny")


@pytest.fixture(scope="module")
def streams(model: Path) -> dict[str, Stream]:
    """A greedy and a sampled stream of an undisturbed engine, as a client would see them."""
    tokens = make_harness(model).generate(greedy("greedy", PROMPT), seeded("sampled", PROMPT, seed=2**63 + 5))
    jobs = {"greedy": Job(tuple(PROMPT), 32, 0.0, 0), "sampled": Job(tuple(PROMPT), 32, 1.0, 2**63 + 5)}
    return {name: complete(job, tokens[name]) for name, job in jobs.items()}


def complete(job: Job, tokens: list[int]) -> Stream:
    return Stream(
        job,
        0.0,
        token_ids=tokens,
        finish_reason="length",
        prompt_tokens=len(job.prompt),
        completion_tokens=len(tokens),
    )


def judged(model: Path, stream: Stream) -> Result:
    result = Result(streams=[stream])
    judge(result, Reference(model))
    return result


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_an_undisturbed_stream_is_right(model: Path, streams: dict[str, Stream], kind: str) -> None:
    assert judged(model, streams[kind]).is_good


SPOILED: dict[str, Callable[[list[int]], list[int]]] = {
    "changed": lambda tokens: [*tokens[:20], (tokens[20] + 1) % 256, *tokens[21:]],
    "repeated": lambda tokens: [*tokens[:20], *tokens[19:-1]],
    "skipped": lambda tokens: [*tokens[:20], *tokens[21:], tokens[0]],
    "swapped": lambda tokens: [*tokens[:20], tokens[21], tokens[20], *tokens[22:]],
    "cut short": lambda tokens: tokens[:-1],
}


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_stream_is_wrong(
    model: Path, streams: dict[str, Stream], kind: str, spoil: Callable[[list[int]], list[int]]
) -> None:
    spoiled = complete(streams[kind].job, spoil(streams[kind].token_ids))
    result = judged(model, spoiled)
    assert list(result.wrong) == [0]
    assert not result.is_good


def test_tokens_drawn_with_another_seed_are_wrong(model: Path, streams: dict[str, Stream]) -> None:
    job = Job(tuple(PROMPT), 32, 1.0, 6)
    assert judged(model, complete(job, streams["sampled"].token_ids)).wrong


def test_usage_that_counts_twice_is_wrong(model: Path, streams: dict[str, Stream]) -> None:
    stream = complete(streams["greedy"].job, streams["greedy"].token_ids)
    stream.completion_tokens += 5
    assert "usage" in judged(model, stream).wrong[0]


def test_a_stream_that_ended_with_an_error_is_lost_and_its_tokens_still_count(
    model: Path, streams: dict[str, Stream]
) -> None:
    tokens = streams["greedy"].token_ids
    stream = Stream(streams["greedy"].job, 0.0, token_ids=[*tokens[:5], tokens[5] ^ 1], error="cut")
    result = judged(model, stream)
    assert list(result.lost) == list(result.wrong) == [0]


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_the_plans_of_the_repository_are_valid(file: Path) -> None:
    plan = load_plan(file)
    assert isinstance(plan, ChaosPlan)
    assert plan.faults
