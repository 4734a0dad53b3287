"""What applications do through the `openai` package, plain and asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.clients.conftest import MODEL
from tests.support.serving import ServeProcess

pytestmark = pytest.mark.clients
QUESTION: Any = [{"role": "system", "content": "You explain words."}, {"role": "user", "content": "What is a tree?"}]


@pytest.fixture(scope="module")
def client(server: ServeProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert error.value.param == "model"


def test_a_chat_is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**fields)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert 0 < whole.usage.completion_tokens <= 12
    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert " " in text.strip(), "not even two words"
    assert last.usage == whole.usage


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "And a bush?"}]
    messages: Any = [*QUESTION, {"role": "assistant", "content": "A tall plant."}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    assert answer.choices[0].message.content


def test_seeds_repeat_and_choices_differ(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "n": 3,
        "seed": 7,
        "temperature": 1.0,
        "max_tokens": 16,
    }
    first, second = (client.chat.completions.create(**fields) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.message.content for choice in second.choices] == texts
    assert len(set(texts)) > 1


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
    )
    assert answer.usage is not None
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token, "a greedy token is the likeliest"
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    said = b"".join(bytes(entry.bytes or []) for entry in entries)
    assert said.decode().startswith(answer.choices[0].message.content or "?")


def test_completions_with_stop_echo_and_bias(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": "A tree is", "temperature": 0, "max_tokens": 8}
    plain = client.completions.create(**fields)
    text = plain.choices[0].text
    stopped = client.completions.create(**fields, stop=[text[4:7]])
    assert stopped.choices[0].text == text[: text.index(text[4:7])]
    assert stopped.choices[0].finish_reason == "stop"
    echoed = client.completions.create(**fields, echo=True, logprobs=1)
    assert echoed.choices[0].text == "A tree is" + text
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    first = echoed.choices[0].logprobs.tokens[-8]
    (banned,) = httpx.post(
        f"{str(client.base_url).removesuffix('/v1/')}/tokenize",
        json={"prompt": first, "add_special_tokens": False},
    ).json()["tokens"]
    other = client.completions.create(**fields, logit_bias={str(banned): -100}, logprobs=1)
    assert first not in other.choices[0].logprobs.tokens


def test_refusals_name_the_parameter(client: openai.OpenAI) -> None:
    refused: list[dict[str, Any]] = [
        {"response_format": {"type": "json_object"}},
        {"temperature": 1000},
        {"store": True},
    ]
    for fields in refused:
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model=MODEL, messages=QUESTION, **fields)
        assert error.value.param == next(iter(fields))


def test_many_streams_at_once_and_one_that_is_left(server: ServeProcess) -> None:
    """Sixteen streams say the same as one alone; a stream that is closed early frees its request."""

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60) as client:

            async def text() -> str:
                fields: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": 12, "stream": True}
                stream = await client.chat.completions.create(model=MODEL, **fields)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            alone = await text()
            assert await asyncio.gather(*(text() for _ in range(16))) == [alone] * 16
            stream = await client.completions.create(model=MODEL, prompt="A", max_tokens=1500, stream=True)
            async for _ in stream:
                break
            await stream.close()
        async with httpx.AsyncClient(base_url=server.url) as http, asyncio.timeout(30):
            while (await http.get("/health")).json()["running"]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    asyncio.run(run())
