"""Chat completions, /tokenize and /detokenize over real HTTP, with a worker whose words the tests choose."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from router.chat_request import UnsupportedChatFields
from router.chat_templates import ChatTemplates
from tests.support.fake_worker import FakeWorker, answer
from tests.unit.router.conftest import EOS_ID, MODEL, Served, serving
from tests.unit.router.reports import known, speaker

TEMPLATES = ChatTemplates(
    {
        "default": "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    },
    {"bos_token": "<eos>"},
)
HELLO = [{"role": "user", "content": "hello"}]


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chatting() -> AsyncIterator[Served]:
    """One for all tests: its reader process takes a moment to start."""
    async with serving(chat_templates=TEMPLATES) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def workers() -> AsyncIterator[list[FakeWorker]]:
    """Append what you start; all are killed at the end."""
    started: list[FakeWorker] = []
    yield started
    for worker in started:
        await worker.kill()


async def chat(served: Served, **fields: Any) -> httpx.Response:
    return await served.http.post("/v1/chat/completions", json={"model": MODEL, "messages": HELLO, **fields})


async def chunks_of(served: Served, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "messages": HELLO, "stream": True, **fields}
    async with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        data = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


async def test_the_whole_answer(workers: list[FakeWorker], chatting: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(chatting, "h\u00e9 you")))
    await chatting.attach(*workers)
    response = await chat(chatting)
    assert response.headers["x-baton-path"].startswith("local; ")
    content = response.json()
    assert content["object"] == "chat.completion"
    assert content["id"].startswith("chatcmpl-")
    (choice,) = content["choices"]
    assert choice["message"] == {"role": "assistant", "content": "h\u00e9 you", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    prompt = "user: hello\nassistant: "
    assert content["usage"]["prompt_tokens"] == 1 + len(prompt)
    (command,) = workers[0].received("generate")
    assert list(command.spec.token_ids) == [EOS_ID, *chatting.tokenizer.encode(prompt)]
    assert command.spec.max_tokens == 512 - 1 - len(prompt), "an answer may be as long as the model allows"
    assert (await chatting.record(content["id"]))["finish_reason"] == "length"


async def test_a_stream_begins_with_the_role_and_ends_with_usage(workers: list[FakeWorker], chatting: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(chatting, "h\u00e9 \U0001f600!")))
    await chatting.attach(*workers)
    *chunks, last = await chunks_of(chatting, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in [*chunks, last]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert not any("role" in delta for delta in deltas[1:])
    pieces = [delta.get("content", "") for delta in deltas]
    assert "".join(pieces) == "h\u00e9 \U0001f600!"
    assert not any("\ufffd" in piece for piece in pieces), "half a character was sent"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 9


async def test_every_chunk_carries_the_usage_so_far_where_that_is_asked_for(
    workers: list[FakeWorker], chatting: Served
) -> None:
    workers.append(FakeWorker("d0", script=speaker(chatting, "abc")))
    await chatting.attach(*workers)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await chunks_of(chatting, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-2:] == [3, 3]


@pytest.mark.parametrize("streamed", [False, True])
async def test_logprobs_have_the_chat_form(workers: list[FakeWorker], chatting: Served, streamed: bool) -> None:
    workers.append(FakeWorker("d0", script=speaker(chatting, "h\u00e9", step=2)))
    await chatting.attach(*workers)
    asked = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    if streamed:
        choices = [chunk["choices"][0] for chunk in await chunks_of(chatting, **asked)]
    else:
        choices = (await chat(chatting, **asked)).json()["choices"]
    entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    ids = chatting.tokenizer.encode("h\u00e9")
    assert [entry["logprob"] for entry in entries] == [known(token_id).logprob for token_id in ids]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "h\u00e9"
    assert [entry["token"] for entry in entries] == ["h", "\ufffd", "\ufffd"]
    texts = chatting.tokenizer.texts
    top = [{"token": texts.text(one), "logprob": -float(one), "bytes": list(texts.raw(one))} for one in (1, 2)]
    assert all(entry["top_logprobs"] == top for entry in entries)


async def test_logprobs_without_top_have_an_empty_list_there(workers: list[FakeWorker], chatting: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(chatting, "ab")))
    await chatting.attach(*workers)
    (choice,) = (await chat(chatting, logprobs=True)).json()["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[], []]
    (command,) = workers[0].received("generate")
    assert command.spec.logprobs == 0


async def test_a_stop_string_across_characters_of_several_bytes(workers: list[FakeWorker], chatting: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(chatting, "a\u4f60\u597db")))
    await chatting.attach(*workers)
    pieces = [chunk["choices"][0] for chunk in await chunks_of(chatting, stop=["\u597db"])]
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == "a\u4f60"
    assert (pieces[-1]["finish_reason"], pieces[-1]["stop_reason"]) == ("stop", "\u597db")


async def test_n_answers_have_indices_and_a_role_each(workers: list[FakeWorker], chatting: Served) -> None:
    workers.append(FakeWorker("d0", script=speaker(chatting, "abc")))
    await chatting.attach(*workers)
    content = (await chat(chatting, n=3, seed=5, temperature=0.7)).json()
    assert [choice["index"] for choice in content["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in content["choices"]} == {"abc"}
    assert {command.spec.choice for command in workers[0].received("generate")} == {0, 1, 2}
    roles = [
        (chunk["choices"][0]["index"], chunk["choices"][0]["delta"]["role"])
        for chunk in await chunks_of(chatting, n=2)
        if "role" in chunk["choices"][0]["delta"]
    ]
    assert sorted(roles) == [(0, "assistant"), (1, "assistant")]


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ({"model": "other"}, "model"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"store": True}, "store"),
    ({"prediction": {"type": "content"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"echo": True}, "echo"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 600}, "max_completion_tokens"),
    ({"max_tokens": 600}, "max_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
    ({"n": 129}, "n"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"temperature": "hot"}, "temperature"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
    ({"guided_json": {}}, "guided_json"),
    ({"user": "x" * 70_000}, "user"),
]


async def test_what_is_not_supported_is_refused_by_name_and_reaches_nobody(
    workers: list[FakeWorker], chatting: Served
) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await chatting.attach(*workers)
    for fields, param in BAD:
        response = await chat(chatting, **fields)
        assert response.status_code in (400, 404), (fields, response.text)
        assert response.json()["error"]["param"] == param, (fields, response.text)
    for content in (b"{", b"[]", b'{"messages":' + b"[" * 100_000, b'{"model":"fake","messages":[1e999,NaN]}'):
        response = await chatting.http.post("/v1/chat/completions", content=content)
        assert response.status_code == 400
    assert chatting.router.dispatcher.is_idle
    assert not workers[0].received("generate")


async def test_values_that_change_nothing_are_accepted(workers: list[FakeWorker], chatting: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await chatting.attach(*workers)
    neutral: dict[str, Any] = {
        **dict.fromkeys(UnsupportedChatFields.model_fields),
        "modalities": ["text"],
        "service_tier": "auto",
        "store": False,
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "max_completion_tokens": 2,
        "max_tokens": 2,
    }
    before = await ignored_fields(chatting)
    response = await chat(chatting, **neutral, user="me", metadata={"a": "b"}, something_new=1)
    assert response.status_code == 200, response.text
    assert await ignored_fields(chatting) == before + 1


async def ignored_fields(served: Served) -> float:
    lines = (await served.http.get("/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith("baton_ignored_fields_total ")).split()[1])


async def test_a_model_without_a_template_says_what_to_do() -> None:
    async with serving() as served:
        response = await chat(served)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "no_chat_template"
    assert "chat_template.jinja" in error["message"]
    assert "/v1/completions" in error["message"]


async def test_before_any_worker_a_chat_without_a_limit_is_unavailable() -> None:
    async with serving(chat_templates=TEMPLATES) as served:
        assert (await chat(served)).status_code == 503


async def test_tokenize_and_detokenize_are_inverse(workers: list[FakeWorker], chatting: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await chatting.attach(*workers)
    for text in ("h\u00e9<eos>\U0001f600", "long " * 20_000):
        body = {"model": MODEL, "prompt": text, "return_token_strs": True}
        content = (await chatting.http.post("/tokenize", json=body)).json()
        assert content["tokens"] == list(chatting.tokenizer.encode(text))
        assert (content["count"], content["max_model_len"]) == (len(content["tokens"]), 512)
        assert len(content["token_strs"]) == content["count"]
        back = await chatting.http.post("/detokenize", json={"tokens": content["tokens"]})
        assert back.json() == {"prompt": text}
    messages = (await chatting.http.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False})).json()
    assert messages["tokens"] == [EOS_ID, *chatting.tokenizer.encode("user: hello\n")]
    assert messages["token_strs"] is None
    assert (await chatting.http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"prompt": ["a", "b"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [1] * 150_000}, "tokens"),
    ],
)
async def test_bad_bodies_of_the_tokenizer_are_refused_by_name(
    chatting: Served, path: str, body: dict[str, Any], param: str
) -> None:
    response = await chatting.http.post(path, json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param


async def test_the_operators_template_is_used_instead_of_the_models(workers: list[FakeWorker], tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}?")
    async with serving(chat_template=tmp_path / "own.jinja") as served:
        workers.append(FakeWorker("d0", script=speaker(served, "x")))
        await served.attach(*workers)
        assert (await chat(served, max_tokens=1)).status_code == 200
        assert list(workers[0].received("generate")[0].spec.token_ids) == list(served.tokenizer.encode("hello?"))
