"""A client that reads slowly finds much to be put into words at once: it must not hold up the others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest

from baton.common.sampling import SamplingParams
from router import grpc_service, turns
from router.choice import Choice, merged
from router.generation import Generation
from router.json_pieces import EncodedList, dumps, encode
from router.output import MAX_EVENT_TOKENS
from router.text import TextAssembler
from router.types import GenerationRequest
from tests.support.fake_worker import FakeWorker, expected_tokens
from tests.unit.router.asking import TOKENS, request
from tests.unit.router.conftest import Served

NUM_TOKENS = 3 * MAX_EVENT_TOKENS + 1
SAMPLING = SamplingParams(max_tokens=NUM_TOKENS)


async def unread(workers: list[FakeWorker], served: Served) -> Generation:
    """A generation that is over, of which nothing has been read."""
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    generation = served.router.dispatcher.submit(GenerationRequest("slow", (1, 2, 3), SAMPLING, 60.0))
    command = await workers[0].next_frame("generate")
    workers[0].say_tokens(command.key, 0, expected_tokens(3, NUM_TOKENS), "length")
    await served.until(lambda: generation._output.num_unread == NUM_TOKENS)
    return generation


async def test_what_lies_there_comes_in_small_events_and_only_the_last_has_the_end(
    workers: list[FakeWorker], served: Served
) -> None:
    events = [event async for event in await unread(workers, served)]
    assert [len(event.token_ids) for event in events] == [MAX_EVENT_TOKENS] * 3 + [1]
    assert [token for event in events for token in event.token_ids] == expected_tokens(3, NUM_TOKENS)
    assert [event.finish_reason for event in events] == [None] * 3 + ["length"]


async def test_others_have_their_turn_while_it_is_put_into_words(
    workers: list[FakeWorker], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN_S", -1.0)
    generation = await unread(workers, served)
    choice = Choice(0, generation, TextAssembler(served.tokenizer, (), (), SAMPLING))
    num_turns = 0

    def count() -> None:
        nonlocal num_turns
        num_turns += 1
        asyncio.get_running_loop().call_soon(count)

    count()
    deltas = [delta async for _, delta in merged([choice])]
    assert len(deltas) <= num_turns


async def test_items_that_are_json_already_read_like_all_others() -> None:
    items = [{"a": [1, "\u2028"]}, {}, [None]]
    encoded = {"logprobs": {"content": EncodedList(list(map(dumps, items))), "none": EncodedList([])}}
    content = {"of": [encoded] * 128, "ids": list(range(1000))}
    expected = {"of": [{"logprobs": {"content": items, "none": []}}] * 128, "ids": list(range(1000))}
    assert json.loads(await encode(content)) == expected
    assert await encode(content) == dumps(expected)


class StalledCall:
    """The servicer's context of a client that reads nothing."""

    def __init__(self) -> None:
        self.aborted: tuple[grpc.StatusCode, str] | None = None

    def time_remaining(self) -> None:
        return None

    async def write(self, _response: object) -> None:
        await asyncio.Event().wait()

    async def abort(self, code: grpc.StatusCode, details: str, _metadata: object) -> None:
        self.aborted = code, details


async def test_over_grpc_a_client_that_reads_nothing_has_its_request_ended(
    workers: list[FakeWorker], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_service, "STALLED_CLIENT_S", 0.1)
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    call: Any = StalledCall()
    answering = asyncio.create_task(served.router._inference.Generate(request(), call))
    command = await workers[0].next_frame("generate")
    workers[0].say_tokens(command.key, 0, TOKENS[:1])
    await answering
    assert call.aborted == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the client has read nothing for 0.1 s")
    assert (await workers[0].next_frame("cancel")).key == command.key
