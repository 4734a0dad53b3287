"""A router's request spec becomes the engine's settings, or a sentence that names the field at fault."""

from __future__ import annotations

import math

import pytest

from baton.common.errors import InvalidRequest
from baton.common.sampling import SamplingParams
from baton.worker.spec import Limits, read_spec
from protos import worker_pb2 as pb

LIMITS = Limits(max_model_len=100, vocab_size=50)


def spec(**fields: object) -> pb.RequestSpec:
    values: dict[str, object] = {"token_ids": [1, 2, 3], "max_tokens": 4, "top_p": 1.0, **fields}
    return pb.RequestSpec(**values)  # type: ignore[arg-type]


def test_what_is_absent_is_off() -> None:
    sampling = read_spec(spec(), LIMITS).sampling
    assert sampling == SamplingParams(max_tokens=4, temperature=0.0, top_k=0)
    assert sampling.is_plain
    assert (sampling.logprobs, sampling.prompt_logprobs) == (None, None)


def test_every_field_arrives() -> None:
    read = read_spec(
        spec(
            num_emitted=1,
            min_tokens=2,
            temperature=0.5,
            top_p=0.75,
            top_k=7,
            seed=2**63 + 1,
            choice=3,
            stop_token_ids=[9, 8, 9],
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=2.0,
            logit_bias={49: -100.0, 0: 0.5},
            logprobs=0,
            prompt_logprobs=20,
        ),
        LIMITS,
    )
    assert read.num_emitted == 1
    assert read.sampling == SamplingParams(
        max_tokens=4,
        temperature=0.5,
        top_p=0.75,
        top_k=7,
        seed=2**63 + 1,
        choice=3,
        min_tokens=2,
        stop_token_ids=frozenset({8, 9}),
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=2.0,
        logit_bias=((0, 0.5), (49, -100.0)),
        logprobs=0,
        prompt_logprobs=20,
    )
    request = read.request("e", 0.0)
    assert request.first_output_position == 2
    assert not request.wants_prompt_logprobs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {50: 1.0}}, "token id 50 is not in the vocabulary"),
        ({"logit_bias": {4: math.nan}}, "logit_bias of token 4"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 2**31}, "prompt_logprobs"),
        ({"min_tokens": 1, "stop_token_ids": list(range(60))}, "every one is a stop token"),
    ],
)
def test_what_cannot_be_served_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_spec(spec(**fields), LIMITS)


def test_stop_tokens_outside_the_vocabulary_do_no_harm() -> None:
    assert read_spec(spec(min_tokens=1, stop_token_ids=[1, 999]), LIMITS).sampling.min_tokens == 1
