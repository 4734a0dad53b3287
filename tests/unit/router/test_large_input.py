"""What is large is read elsewhere, or in slices, and gives the same as if it were small."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import to_json
from uvicorn.protocols.http.h11_impl import H11Protocol

from baton.common.errors import InvalidRequest
from router import body_limit, http_protocol
from router.http_protocol import BoundedH11Protocol
from router.prompt_shape import check_prompt
from router.reader import pool
from router.reader.bodies import read_fields, small_json, take_prompt
from router.reader.frames import HEADER, decode_reply, encode_error, encode_reply
from tests.support.fake_worker import FakeWorker, answer, emit
from tests.unit.router.conftest import MODEL, Served

token_ids = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)
prompts = st.text() | token_ids | st.lists(st.text(), min_size=1) | st.lists(token_ids, min_size=1)


@settings(deadline=None)
@given(prompts, st.dictionaries(st.text().filter(lambda name: name != "prompt"), st.integers() | st.text()))
def test_a_body_read_by_the_process_is_the_body_read_here(prompt: Any, fields: dict[str, Any]) -> None:
    body = to_json({**fields, "prompt": prompt})
    here = take_prompt(read_fields(body))
    reply = encode_reply(here, small_json(here.fields))
    there = decode_reply(reply[HEADER.size :])
    assert there.fields == here.fields
    assert plain(there.prompt) == plain(here.prompt) == prompt
    check_prompt(there.prompt)


def plain(prompt: Any) -> Any:
    if isinstance(prompt, array):
        return list(prompt)
    return [plain(item) for item in prompt] if isinstance(prompt, list) else prompt


def test_errors_cross_the_process_boundary_whole() -> None:
    with pytest.raises(InvalidRequest, match="no \u2028") as error:
        decode_reply(encode_error(InvalidRequest("no \u2028", "messages", "code"))[HEADER.size :])
    assert (error.value.param, error.value.code) == ("messages", "code")


def test_fields_that_are_not_small_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest) as error:
        small_json({"user": "x", "metadata": {"k": "v" * 70_000}})
    assert error.value.param == "metadata"


@pytest.fixture
def nothing_large_is_parsed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def small_only(body: bytes) -> dict[str, object]:
        assert len(body) <= 32 * 1024, "a large body was parsed on the event loop"
        return read_fields(body)

    monkeypatch.setattr(pool, "read_fields", small_only)


@pytest.mark.usefixtures("nothing_large_is_parsed_here")
async def test_large_bodies_are_parsed_in_another_process(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer, max_model_len=40_000, num_blocks=4000))
    await served.attach(*workers)
    ids = [index % 256 for index in range(20_000)]
    text = "a \u4f60 " * 6000
    for prompt, expected in ((ids, ids), (text, served.tokenizer.encode(text))):
        response = await served.complete(prompt=prompt, max_tokens=1)
        assert response.status_code == 200, response.text
        assert list(workers[0].received("generate")[-1].spec.token_ids) == list(expected)
    response = await served.complete(prompt=[*ids, 300])
    assert response.json()["error"]["param"] == "prompt"
    response = await served.complete(prompt=[*ids, -1])
    assert response.json()["error"]["param"] == "prompt"
    response = await served.complete(prompt=ids * 3)
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_a_reader_process_that_is_killed_is_replaced(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer, max_model_len=40_000, num_blocks=4000))
    await served.attach(*workers)
    body = {"prompt": [1] * 20_000, "max_tokens": 1}
    assert (await served.complete(**body)).status_code == 200
    reader = served.router.reader
    for process in reader._processes:
        await process.end()
    assert [(await served.complete(**body)).status_code for _ in range(3)] == [200] * 3


async def raw(served: Served, request: bytes) -> tuple[bytes, Any]:
    """The status line and the JSON that follows the head."""
    stream, writer = await asyncio.open_connection("127.0.0.1", served.router.http_port)
    writer.write(request)
    head = await asyncio.wait_for(stream.readuntil(b"\r\n\r\n"), 20)
    size = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    content = await stream.readexactly(size)
    writer.close()
    return head.partition(b"\r\n")[0], json.loads(content)


@pytest.fixture
def packets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lines in everything that h11 is given at once."""
    lines: list[int] = []
    original = H11Protocol.data_received

    def recorded(self: H11Protocol, data: bytes) -> None:
        lines.append(data.count(b"\n"))
        original(self, data)

    monkeypatch.setattr(H11Protocol, "data_received", recorded)
    return lines


async def test_a_body_in_tiny_chunks_is_fed_in_slices_and_understood(
    workers: list[FakeWorker], served: Served, packets: Sequence[int]
) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    body = json.dumps({"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2, "user": "x" * 20_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    status, content = await raw(served, head + chunks)
    assert b" 200 " in status, content
    assert content["usage"]["completion_tokens"] == 2
    assert sum(packets) >= 2 * len(body)
    assert max(packets) <= 1024


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a:b\r\n" * 100_000,
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x" * 100_000,
        b"GET /health HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["many headers", "long header", "two hosts", "not HTTP", "broken chunk"],
)
async def test_what_is_no_http_is_refused_in_the_apis_form(served: Served, request_bytes: bytes) -> None:
    status, content = await raw(served, request_bytes)
    assert b" 400 " in status
    assert content["error"]["code"] == "invalid_http"
    assert (await served.http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /health HTTP/1.1\r\n",
    ],
    ids=["nothing", "half a head", "half a body", "half of a second request"],
)
async def test_a_request_that_does_not_become_whole_is_given_up(
    served: Served, monkeypatch: pytest.MonkeyPatch, part: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "REQUEST_S", 0.2)
    monkeypatch.setattr(http_protocol, "_DISCARD_S", 0.1)
    state = served.router._http.server_state
    stream, writer = await asyncio.open_connection("127.0.0.1", served.router.http_port)
    writer.write(part)
    said = await asyncio.wait_for(stream.read(), 30)
    assert (b" 408 " in said) == (b'"code": "request_timeout"' in said) == bool(part)
    await served.until(lambda: not state.connections and not state.tasks)
    writer.close()


def connection_of(served: Served) -> BoundedH11Protocol:
    """The only one."""
    (connection,) = served.router._http.server_state.connections
    assert isinstance(connection, BoundedH11Protocol)
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("num_lines", [0, 4000], ids=["one line", "many lines"])
async def test_an_answer_may_take_longer_than_its_request_may(
    workers: list[FakeWorker], served: Served, stream: bool, num_lines: int
) -> None:
    """Many lines in one packet are fed in slices."""
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    body = json.dumps({"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2, "stream": stream}) + num_lines * " \n"
    asking = asyncio.create_task(served.http.post("/v1/completions", content=body))
    command = await workers[0].next_frame("generate")
    assert connection_of(served)._request_check is None
    emit(workers[0], command.key, command.spec, 0, 2)
    answered = await asking
    assert answered.status_code == 200
    assert not stream or answered.text.endswith("data: [DONE]\n\n")
    assert connection_of(served)._request_check is not None, "the next request has its time again"


async def test_a_request_has_its_time_from_its_first_byte_on(served: Served) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", served.router.http_port)
    await served.until(lambda: bool(served.router._http.server_state.connections))
    connection = connection_of(served)
    checks = [connection._request_check]
    for part, runs_anew in ((b"GET /heal", True), (b"th HTTP/1.1\r\n", False)):
        writer.write(part)
        await served.until(lambda part=part: connection.conn.trailing_data[0].endswith(part))  # type: ignore[misc]
        checks.append(connection._request_check)
        assert checks[-1] is not None
        assert (checks[-1] is not checks[-2]) == runs_anew
    writer.close()


async def test_a_client_that_asks_first_whether_to_send_is_refused_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_limit, "_DISCARD_S", 30.0)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n"
    status, content = await asyncio.wait_for(raw(served, head), 15)
    assert b" 413 " in status
    assert content["error"]["code"] == "body_too_large"
