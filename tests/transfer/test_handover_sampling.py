"""Settings that look back, and log-probabilities, over a hand-over: what one worker alone would have done."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from protos import worker_pb2 as pb
from tests.support.worker_client import WorkerClient
from tests.transfer.handover_cluster import Cluster, prompt, spec

SETTINGS: dict[str, dict[str, object]] = {
    "greedy": {"repetition_penalty": 1.6, "frequency_penalty": 0.4, "logprobs": 3},
    "drawn": {
        "temperature": 0.9,
        "seed": 3,
        "min_p": 0.05,
        "presence_penalty": 1.1,
        "logit_bias": {5: 6.0, 9: -3.0},
        "logprobs": 1,
    },
    "late stop": {"stop_token_ids": list(range(0, 258, 2)), "min_tokens": 9, "logprobs": 0},
}


def in_order(*clients: WorkerClient, key: tuple[str, int]) -> list[pb.TokenLogprobs]:
    known = {position: value for client in clients for position, value in client.logprobs[key].items()}
    return [known[position] for position in sorted(known)]


def assert_same(got: Iterable[pb.TokenLogprobs], expected: Iterable[pb.TokenLogprobs]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one.token_id, one.rank, one.top_token_ids) == (other.token_id, other.rank, other.top_token_ids)
        assert [one.logprob, *one.top_logprobs] == pytest.approx([other.logprob, *other.top_logprobs], abs=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
async def test_remote_equals_local(connected: Cluster, name: str) -> None:
    request = spec(prompt(60), 24, **SETTINGS[name])
    local = await connected.local("local", request)
    remote = await connected.remote("remote", request)
    assert remote == local
    expected = in_order(connected.to_decode, key=("local", 1))
    got = in_order(connected.to_prefill, connected.to_decode, key=("remote", 1))
    assert [known.token_id for known in got] == remote
    assert len(connected.to_prefill.logprobs["remote", 1]) == 1
    assert_same(got, expected)
    plain = await connected.local("plain", spec(prompt(60), 24, temperature=request.temperature, seed=request.seed))
    assert plain != local
    if name == "late stop":
        assert len(local) >= 10
        assert all(token % 2 for token in local[:9])
        assert local[-1] % 2 == 0 or len(local) == 24
    await connected.at_rest()


@pytest.mark.parametrize("name", ["greedy", "drawn"])
@pytest.mark.parametrize("num_emitted", [1, 7])
async def test_a_resubmitted_request_goes_on_where_it_was(connected: Cluster, name: str, num_emitted: int) -> None:
    tokens = await connected.local("whole", spec(prompt(50), 16, **SETTINGS[name]))
    resubmitted = prompt(50) + tokens[:num_emitted]
    rest = spec(resubmitted, 16 - num_emitted, num_emitted=num_emitted, **SETTINGS[name])
    assert await connected.remote("rest", rest) == tokens[num_emitted:]
    expected = in_order(connected.to_decode, key=("whole", 1))[num_emitted:]
    assert_same(in_order(connected.to_prefill, connected.to_decode, key=("rest", 1)), expected)


async def test_log_probabilities_of_the_prompt_come_with_the_first_token(connected: Cluster) -> None:
    """Also where both workers have its blocks in their prefix caches."""
    request = spec(prompt(100), 3, prompt_logprobs=2, logprobs=1)
    await connected.local("before", spec(prompt(100)))
    local = await connected.local("local", request)
    expected = connected.to_decode.prompt_logprobs["local", 1]
    assert [known.token_id for known in expected] == prompt(100)[1:]
    for name in ("first", "second"):
        assert await connected.remote(name, request) == local
        assert connected.to_decode.reserved[name, 1].num_cached_tokens == 96
        assert_same(connected.to_prefill.prompt_logprobs[name, 1], expected)
        assert (name, 1) not in connected.to_decode.prompt_logprobs
    await connected.at_rest()
