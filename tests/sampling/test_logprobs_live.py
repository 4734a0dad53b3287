"""Log-probabilities of outputs and prompts over HTTP, on both paths, against transformers in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from protos import inference_pb2 as pb
from router.tokenizer import Tokenizer
from tests.sampling.live import Live, Server, counted_prefills
from tests.support.sampling_oracle import SamplingOracle
from tests.support.tiny_model import EOS_TOKEN_ID
from tests.transfer.handover_cluster import prompt

pytestmark = pytest.mark.asyncio(loop_scope="session")
BY_ID: dict[str, Any] = {"return_tokens_as_token_ids": True, "return_token_ids": True}


def ids(names: list[str]) -> list[int]:
    return [int(name.removeprefix("token_id:")) for name in names]


def assert_reported(logprobs: dict[str, Any], rows: torch.Tensor, num_top: int) -> None:
    """`rows`: [num_tokens, vocab_size] log-probabilities, one row for each reported token."""
    for index, token in enumerate(ids(logprobs["tokens"])):
        row = rows[index]
        assert logprobs["token_logprobs"][index] == pytest.approx(float(row[token]), abs=1e-4)
        top = {ids([name])[0]: value for name, value in logprobs["top_logprobs"][index].items()}
        assert set(top) == {*row.topk(num_top).indices.tolist(), token}
        for other, value in top.items():
            assert value == pytest.approx(float(row[other]), abs=1e-4)


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 4, "repetition_penalty": 1.5, "logit_bias": {"3": 9}}])
async def test_outputs_are_reported_with_the_models_own_values(
    server: Server, oracle: SamplingOracle, fields: dict[str, Any]
) -> None:
    """Penalties, bias and temperature change what is drawn, not what is reported."""
    token_ids = prompt(40)
    content = await server.complete(prompt=token_ids, max_tokens=12, logprobs=4, **BY_ID, **fields)
    (choice,) = content["choices"]
    assert ids(choice["logprobs"]["tokens"]) == choice["token_ids"]
    rows = oracle.logprobs(token_ids + choice["token_ids"])[len(token_ids) - 1 : -1]
    assert_reported(choice["logprobs"], rows, 4)


@pytest.mark.parametrize("length", [1, 16, 100])
async def test_prompts_are_reported_also_over_a_prefix_cache_hit(
    server: Server, oracle: SamplingOracle, length: int
) -> None:
    """The prompt's blocks are cached on both workers by the time of the second and third request."""
    token_ids = prompt(length, seed=length + len(server.path))
    rows = oracle.logprobs(token_ids)
    asked: dict[str, Any] = {"prompt": token_ids, "max_tokens": 3, "temperature": 0, **BY_ID}
    plain = (await server.complete(**asked))["choices"][0]
    for _ in range(2):
        (choice,) = (await server.complete(**asked, echo=True, logprobs=2))["choices"]
        logprobs = choice["logprobs"]
        assert ids(logprobs["tokens"]) == token_ids + plain["token_ids"]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        of_prompt = {key: logprobs[key][1:length] for key in ("tokens", "token_logprobs", "top_logprobs")}
        assert_reported(of_prompt, rows[:-1], 2)
        assert choice["text"].endswith(plain["text"])
        assert len(logprobs["text_offset"]) == length + 3
    scored = await server.complete(**{**asked, "max_tokens": 0}, echo=True, logprobs=2)
    assert ids(scored["choices"][0]["logprobs"]["tokens"]) == token_ids
    assert scored["usage"] == {"prompt_tokens": length, "completion_tokens": 0, "total_tokens": length}


async def test_text_and_its_ids_are_echoed_alike(server: Server, model: Path) -> None:
    text = "h\u00e9llo, w\u00f6rld"
    asked: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1}
    (of_text,) = (await server.complete(prompt=text, **asked))["choices"]
    (of_ids,) = (await server.complete(prompt=list(Tokenizer.load(model).encode(text)), **asked))["choices"]
    assert of_text == of_ids
    assert of_text["text"].startswith(text)
    starts = of_text["logprobs"]["text_offset"]
    assert starts == sorted(starts)
    assert starts[len(text.encode())] == len(text)


async def test_the_forms_of_vllm_and_grpc_agree(server: Server, oracle: SamplingOracle) -> None:
    token_ids = prompt(30, seed=7)
    asked: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    content = await server.complete(prompt=token_ids, prompt_logprobs=1, logprobs=1, **asked, **BY_ID)
    (choice,) = content["choices"]
    rows = oracle.logprobs(token_ids + choice["token_ids"])
    first, *entries = choice["prompt_logprobs"]
    assert first is None
    for index, entry in enumerate(entries):
        token = token_ids[index + 1]
        rank = int((rows[index] > rows[index][token]).sum()) + 1
        assert entry[str(token)]["rank"] == rank
        assert entry[str(token)]["logprob"] == pytest.approx(float(rows[index][token]), abs=1e-4)
    request = pb.GenerateRequest(
        model="m",
        token_ids=pb.TokenIds(ids=token_ids),
        sampling=pb.SamplingParams(**asked),
        prompt_logprobs=1,
        logprobs=1,
    )
    responses = [response async for response in server.grpc.Generate(request)]
    of_prompt = [entry for response in responses for entry in response.prompt_logprobs]
    assert [entry.token_id for entry in of_prompt] == token_ids[1:]
    for known, entry in zip(of_prompt, entries, strict=True):
        assert known.logprob == pytest.approx(entry[str(known.token_id)]["logprob"], abs=1e-4)
    of_output = [entry for response in responses for entry in response.logprobs]
    assert [entry.token_id for entry in of_output] == choice["token_ids"]
    assert all(entry.rank == 1 == len(entry.top) for entry in of_output)


async def test_a_stop_token_is_reported_too(server: Server) -> None:
    bias = {str(EOS_TOKEN_ID): 100}
    (choice,) = (await server.complete(prompt="a", logit_bias=bias, logprobs=0, min_tokens=2, **BY_ID))["choices"]
    assert ids(choice["logprobs"]["tokens"]) == choice["token_ids"]
    assert len(choice["token_ids"]) == 3


async def test_a_report_on_the_prompt_is_not_taken_from_the_cache_for_every_choice(cluster: Live) -> None:
    """Only the first choice computes what is cached; the others share it."""
    token_ids = prompt(64, seed=50)
    server = cluster.servers["local"]
    await server.complete(prompt=token_ids, max_tokens=1)
    with counted_prefills() as prefills:
        content = await server.complete(prompt=token_ids, max_tokens=4, n=3, echo=True, logprobs=1, **BY_ID)
    reports = [choice["logprobs"]["token_logprobs"][:64] for choice in content["choices"]]
    assert reports[0] == reports[1] == reports[2]
    assert sorted(prefills.computed.values())[-1] == 64
    assert prefills.total <= 64 + 2 * 16


async def test_nothing_is_left(cluster: Live) -> None:
    await cluster.at_rest()
