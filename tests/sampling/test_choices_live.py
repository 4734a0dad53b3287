"""n choices on both paths: one prefill, one transfer, draws of their own; and over the loss of a worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router.registry import Member
from tests.sampling.live import Live, Server, counted_prefills, live
from tests.sampling.test_settings import params
from tests.support.sampling_oracle import SamplingOracle
from tests.transfer.handover_cluster import prompt

pytestmark = pytest.mark.asyncio(loop_scope="session")
SETTINGS: dict[str, dict[str, Any]] = {
    "drawn": {"temperature": 1.0},
    "penalised": {"temperature": 0.9, "frequency_penalty": 1.0, "min_p": 0.02, "min_tokens": 9},
}


@pytest.mark.parametrize(("name", "length"), [("drawn", 1), ("penalised", 40), ("drawn", 48), ("penalised", 100)])
async def test_choices_share_the_prompt_and_draw_their_own(
    server: Server, oracle: SamplingOracle, name: str, length: int
) -> None:
    token_ids = prompt(length, seed=len(name) + 3 * length + len(server.path))
    fields = {**SETTINGS[name], "seed": 21, "max_tokens": 14}
    with counted_prefills() as prefills:
        content = await server.complete(prompt=token_ids, n=4, return_token_ids=True, logprobs=1, **fields)
    outputs = [choice["token_ids"] for choice in content["choices"]]
    for number, output in enumerate(outputs):
        oracle.check(token_ids, output, params(fields, choice=number))
    assert len({tuple(output) for output in outputs}) == 4
    assert len({output[0] for output in outputs}) > 1
    assert content["usage"]["prompt_tokens"] == length
    assert content["usage"]["completion_tokens"] == sum(map(len, outputs))
    listed = (await server.http.get(f"/v1/requests/{content['id']}")).json()["data"]
    attempts = [record["attempts"] for record in listed]
    assert all(len(tries) == 1 for tries in attempts)
    assert [tries[0]["path"] for tries in attempts] == [server.path, *["local"] * 3]
    assert len({tries[0]["worker"] for tries in attempts}) == 1
    assert max(prefills.computed.values()) == length
    assert prefills.total <= length + 3 * 16


async def test_one_token_of_the_prompt_is_computed_for_each_further_choice(server: Server) -> None:
    """The rest lies in shared blocks, the last of which is copied."""
    token_ids = prompt(90, seed=len(server.path))
    with counted_prefills() as prefills:
        content = await server.complete(prompt=token_ids, n=3, max_tokens=200, ignore_eos=True)
    assert content["usage"]["completion_tokens"] == 600
    assert sorted(prefills.computed.values()) == [1, 1, 90]
    forks = {request.fork_of for request in prefills.requests.values() if request.fork_of}
    assert len(forks) == 1


async def test_a_choice_is_what_it_would_be_alone(cluster: Live) -> None:
    """The first choice of n is the only one of 1, and both paths have the same n."""
    fields: dict[str, Any] = {"prompt": prompt(50, seed=2), "seed": 5, "max_tokens": 10, "return_token_ids": True}
    of_path = {}
    for path, server in cluster.servers.items():
        of_path[path] = [choice["token_ids"] for choice in (await server.complete(**fields, n=3))["choices"]]
    assert of_path["local"] == of_path["remote"]
    single = (await cluster.servers["local"].complete(**fields))["choices"][0]["token_ids"]
    assert of_path["local"][0] == single


async def test_many_choices_of_many_prompts_at_once(server: Server, oracle: SamplingOracle) -> None:
    """More than a worker has seats for: the rest waits its turn."""
    prompts = [prompt(length, seed=length) for length in (1, 16, 33, 70)]
    content = await server.complete(prompt=prompts, n=6, seed=1, max_tokens=5, return_token_ids=True)
    for index, choice in enumerate(content["choices"]):
        assert choice["index"] == index
        oracle.check(prompts[index // 6], choice["token_ids"], params({"max_tokens": 5, "seed": 1}, choice=index % 6))
    assert content["usage"]["prompt_tokens"] == 1 + 16 + 33 + 70


@pytest.mark.parametrize("path", ["local", "remote"])
async def test_the_loss_of_a_worker_changes_no_choice(model: Path, oracle: SamplingOracle, path: str) -> None:
    """Decode is lost amid the answers: what each choice has emitted counts as output, not as prompt, from then on."""
    token_ids = prompt(40, seed=77)
    fields: dict[str, Any] = {
        "seed": 3,
        "max_tokens": 120,
        "min_tokens": 60,
        "temperature": 0.8,
        "frequency_penalty": 0.8,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.2,
        "stop_token_ids": list(range(0, 256, 3)),
    }
    async with live(model) as cluster:
        server = cluster.servers[path]
        body = {"model": "m", "prompt": token_ids, "n": 3, "stream": True, "return_token_ids": True, "logprobs": 0}
        outputs: dict[int, list[int]] = {0: [], 1: [], 2: []}
        reported: dict[int, int] = dict.fromkeys(outputs, 0)
        ends: dict[int, str] = {}
        request_id = ""
        async with server.http.stream("POST", "/v1/completions", json={**body, **fields}) as response:
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                content = json.loads(data)
                request_id = content["id"]
                (choice,) = content["choices"]
                outputs[choice["index"]] += choice["token_ids"]
                reported[choice["index"]] += len(choice["logprobs"]["tokens"])
                if choice["finish_reason"]:
                    ends[choice["index"]] = choice["finish_reason"]
                if all(len(output) >= 3 for output in outputs.values()) and not ends:
                    server.router.registry.set_members([Member(cluster.prefill.address, "prefill")])
        records = server.router.recent.group(request_id)
        assert [len(record.attempts) for record in records] == [2, 2, 2]
        for number, output in outputs.items():
            oracle.check(token_ids, output, params(fields, choice=number))
            assert reported[number] == len(output) >= 60
            assert ends[number] in ("stop", "length")


async def test_nothing_is_left(cluster: Live) -> None:
    await cluster.at_rest()
