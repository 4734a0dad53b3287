"""The judge of a chaos run: it must accept what an undisturbed engine says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from baton.chaos.judge import Judge, mistyped
from baton.chaos.load import Job, Stream
from baton.chaos.plan import ChaosPlan, load_plan
from baton.chaos.reference import Reference
from baton.chaos.result import Result
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


def text_of(tokens: list[int]) -> str:
    """The tokenizer of the tiny model has one token per byte, and two that have no text."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def complete(job: Job, tokens: list[int]) -> Stream:
    return Stream(
        job,
        0.0,
        token_ids=tokens,
        text=text_of(tokens),
        finish_reason="length",
        prompt_tokens=len(job.prompt),
        completion_tokens=len(tokens),
    )


def judged(model: Path, stream: Stream) -> Result:
    result = Result(streams=[stream])
    Judge(model, Reference(model)).judge(result, print)
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


def test_a_stream_that_its_client_cancelled_is_judged_by_its_tokens_alone(
    model: Path, streams: dict[str, Stream]
) -> None:
    tokens = streams["greedy"].token_ids
    for answer, is_good in ((tokens[:5], True), ([*tokens[:5], tokens[5] ^ 1], False)):
        stream = Stream(streams["greedy"].job, 0.0, token_ids=answer, cancelled=True)
        assert judged(model, stream).is_good is is_good


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


STOP = "<&>"


def stopped(model: Path, *, tokens: str, text: str, finish_reason: str = "stop") -> str:
    """What the judge of text says of an answer to a request with STOP."""
    stream = complete(Job((1,), 32, 0.0, 0, stop=(STOP,)), list(tokens.encode()))
    stream.text, stream.finish_reason = text, finish_reason
    return mistyped(stream, Tokenizer.from_file(str(model / "tokenizer.json")))


def test_text_ends_before_the_stop_string(model: Path) -> None:
    assert not stopped(model, tokens="abc<&>", text="abc")
    assert not stopped(model, tokens="abc<&", text="abc<&", finish_reason="length")
    assert stopped(model, tokens="abc<&>", text="abc<")
    assert stopped(model, tokens="abc<&>", text="ab")


def test_a_stop_string_ends_the_tokens_too(model: Path) -> None:
    assert stopped(model, tokens="abc<&>d", text="abc")
    assert stopped(model, tokens="abc<&", text="abc<&")
    assert stopped(model, tokens="abc<&>", text="abc<&>", finish_reason="length")


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_the_plans_of_the_repository_are_valid(file: Path) -> None:
    plan = load_plan(file)
    assert isinstance(plan, ChaosPlan)
    assert plan.faults
