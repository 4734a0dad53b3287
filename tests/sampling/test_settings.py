"""Every sampling setting over HTTP, on both paths, against transformers' own order of operations token by token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.common.sampling import SamplingParams
from protos import inference_pb2 as pb
from tests.sampling.live import Live, Server
from tests.support.sampling_oracle import SamplingOracle
from tests.support.tiny_model import EOS_TOKEN_ID, VOCAB_SIZE
from tests.transfer.handover_cluster import prompt

pytestmark = pytest.mark.asyncio(loop_scope="session")
GREEDY: dict[str, Any] = {"temperature": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": GREEDY,
    "hot": {"temperature": 1.7},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.6},
    "min-p": {"min_p": 0.2},
    "repetition, greedy": {**GREEDY, "repetition_penalty": 1.8},
    "repetition below one": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": -2.0},
    "frequency": {"temperature": 0.4, "frequency_penalty": 1.5},
    "frequency below zero": {"frequency_penalty": -2.0},
    "bias": {"logit_bias": {"7": 5.5, "9": -100, "12": 4}},
    "min_tokens": {"stop_token_ids": list(range(0, VOCAB_SIZE, 2)), "min_tokens": 11},
    "everything": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.6,
        "logit_bias": {"3": 2.0, "200": -3.5},
        "stop_token_ids": [11, 12, 13, 14],
        "min_tokens": 20,
    },
}


def params(fields: dict[str, Any], **more: Any) -> SamplingParams:
    """What the fields mean, read anew."""
    known = {"max_tokens": 16, **fields, **more}
    bias = {int(token): float(value) for token, value in known.pop("logit_bias", {}).items()}
    stops = frozenset(known.pop("stop_token_ids", [])) | {EOS_TOKEN_ID}
    return SamplingParams(**known, stop_token_ids=stops, logit_bias=tuple(bias.items()))


async def answers(server: Server, seed: int, **prompts: list[int]) -> dict[str, dict[str, Any]]:
    """40 tokens with each setting, all asked for at once: batches are mixed."""
    fields = {"max_tokens": 40, "seed": seed, "return_token_ids": True}
    asked = [server.complete(prompt=prompts[name], **fields, **SETTINGS[name]) for name in SETTINGS]
    return dict(zip(SETTINGS, await asyncio.gather(*asked), strict=True))


async def test_tokens_are_those_of_the_reference(server: Server, oracle: SamplingOracle) -> None:
    seed, prompts = 2**63 + 17, {name: prompt(45, seed=len(name)) for name in SETTINGS}
    for name, content in (await answers(server, seed, **prompts)).items():
        (choice,) = content["choices"]
        output = choice["token_ids"]
        sampling = params({**SETTINGS[name], "max_tokens": 40, "seed": seed})
        oracle.check(prompts[name], output, sampling)
        ended = output[-1] in sampling.stop_token_ids and len(output) > sampling.min_tokens
        assert choice["finish_reason"] == ("stop" if ended else "length"), name
        assert choice["stop_reason"] == (output[-1] if ended else None), name
        assert len(output) == 40 or ended, name
        assert not set(output[: sampling.min_tokens]) & sampling.stop_token_ids, name
        assert content["usage"] == {
            "prompt_tokens": 45,
            "completion_tokens": len(output),
            "total_tokens": 45 + len(output),
        }, name


async def test_settings_change_what_is_drawn(cluster: Live) -> None:
    """So that the table above does not pass because nothing has any effect."""
    contents = await answers(cluster.servers["local"], 3, **dict.fromkeys(SETTINGS, prompt(45)))
    outputs = {name: tuple(content["choices"][0]["token_ids"]) for name, content in contents.items()}
    assert len(set(outputs.values())) == len(SETTINGS), outputs


async def test_a_seed_draws_the_same_on_every_path_and_over_grpc(cluster: Live, oracle: SamplingOracle) -> None:
    token_ids = prompt(33)
    fields: dict[str, Any] = {"max_tokens": 12, "seed": 99, "temperature": 0.75, "presence_penalty": 0.5}
    outputs = []
    for server in cluster.servers.values():
        content = await server.complete(prompt=token_ids, return_token_ids=True, **fields)
        outputs.append(content["choices"][0]["token_ids"])
        request = pb.GenerateRequest(
            model="m",
            token_ids=pb.TokenIds(ids=token_ids),
            sampling=pb.SamplingParams(**fields),
            return_token_ids=True,
        )
        responses = [response async for response in server.grpc.Generate(request)]
        assert responses[-1].path == server.path
        outputs.append([token for response in responses for token in response.token_ids])
    assert all(output == outputs[0] for output in outputs)
    oracle.check(token_ids, outputs[0], params(fields))
    other = await cluster.servers["local"].complete(prompt=token_ids, return_token_ids=True, **{**fields, "seed": 100})
    assert other["choices"][0]["token_ids"] != outputs[0]
    free = [await cluster.servers["local"].complete(prompt=token_ids, max_tokens=12) for _ in range(2)]
    assert free[0]["choices"][0]["text"] != free[1]["choices"][0]["text"]


EOS_BIAS = {str(EOS_TOKEN_ID): 100}


async def test_eos_is_banned_before_min_tokens_and_may_be_ignored(server: Server) -> None:
    """With this bias EOS is drawn as soon as it may be."""
    asked: dict[str, Any] = {"prompt": prompt(20), "max_tokens": 6, "logit_bias": EOS_BIAS, "return_token_ids": True}
    for min_tokens in (0, 1, 4):
        (choice,) = (await server.complete(**asked, min_tokens=min_tokens))["choices"]
        assert choice["token_ids"].index(EOS_TOKEN_ID) == len(choice["token_ids"]) - 1 == min_tokens
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", EOS_TOKEN_ID)
    (choice,) = (await server.complete(**asked, min_tokens=6))["choices"]
    assert EOS_TOKEN_ID not in choice["token_ids"]
    (choice,) = (await server.complete(**asked, ignore_eos=True))["choices"]
    assert (choice["token_ids"], choice["finish_reason"]) == ([EOS_TOKEN_ID] * 6, "length")
    (choice,) = (await server.complete(**asked, ignore_eos=True, stop_token_ids=[EOS_TOKEN_ID], min_tokens=2))[
        "choices"
    ]
    assert choice["token_ids"].index(EOS_TOKEN_ID) == 2


async def test_stop_strings_end_the_output_wherever_they_fall(server: Server) -> None:
    asked: dict[str, Any] = {"prompt": "hello", "max_tokens": 40, "temperature": 0}
    text = (await server.complete(**asked))["choices"][0]["text"]
    for start, end in ((0, 1), (0, 3), (7, 9)):
        stop = text[start:end]
        content = await server.complete(**asked, stop=[stop, "\x00never"])
        (choice,) = content["choices"]
        assert choice["text"] == text[: text.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        assert content["usage"]["completion_tokens"] < 40


async def test_nothing_is_left(cluster: Live) -> None:
    await cluster.at_rest()
