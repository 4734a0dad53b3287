"""The HTTP and event-stream readers: every split of the bytes reads the same, and nonsense is an error."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serve.http1 import BadResponse, ResponseReader
from benchmarks.serve.sse import BadEvents, EventReader

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Baton-Path: remote\r\n"


def chunked(parts: list[bytes], trailer: bytes = b"") -> bytes:
    chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in parts if part)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailer + b"\r\n"


def feed_in_pieces(reader: ResponseReader, data: bytes, cuts: list[int]) -> bytes:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return b"".join(reader.feed(data[a:b]) for a, b in pairwise(edges))


cuts = st.lists(st.integers(0, 10_000), max_size=30)


@given(st.lists(st.binary(max_size=40), max_size=8), cuts, st.sampled_from([b"", b"x-sum: 1\r\n"]))
def test_chunked_bodies_survive_any_split(parts: list[bytes], cuts: list[int], trailer: bytes) -> None:
    reader = ResponseReader()
    assert feed_in_pieces(reader, chunked(parts, trailer), cuts) == b"".join(parts)
    assert reader.complete
    assert reader.keep_alive
    assert reader.headers["x-baton-path"] == "remote"


@given(st.binary(max_size=60), cuts)
def test_bodies_with_a_length_survive_any_split(body: bytes, cuts: list[int]) -> None:
    reader = ResponseReader()
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert feed_in_pieces(reader, data, cuts) == body
    assert reader.complete
    assert reader.status == 200


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5), st.integers(1, 10_000))
def test_a_cut_off_body_is_not_complete(parts: list[bytes], missing: int) -> None:
    data = chunked(parts)
    reader = ResponseReader()
    reader.feed(data[: len(data) - 1 - missing % (len(data) - 1)])
    assert not reader.close()


def test_a_body_until_the_end_of_the_connection() -> None:
    reader = ResponseReader()
    assert reader.feed(HEAD + b"\r\nabc") == b"abc"
    assert not reader.complete
    assert reader.close()
    assert not reader.keep_alive


@pytest.mark.parametrize("line", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n"])
def test_connections_that_will_be_closed_are_not_kept(line: bytes) -> None:
    reader = ResponseReader()
    reader.feed(line + b"Content-Length: 2\r\n\r\nok")
    assert reader.complete
    assert not reader.keep_alive


def test_bytes_after_the_response_spoil_the_connection() -> None:
    reader = ResponseReader()
    reader.feed(HEAD + b"Content-Length: 2\r\n\r\nokHTTP/1.1 200")
    assert reader.complete
    assert not reader.keep_alive


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        HEAD + b"no colon\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabXX",
        b"x" * 70_000,
    ],
)
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(BadResponse):
        ResponseReader().feed(data)


@given(st.lists(st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"])), max_size=6), cuts)
def test_events_survive_any_split(payloads: list[str], cuts: list[int]) -> None:
    stream = "".join(f": comment\nevent: x\ndata: {payload}\r\n\r\n" for payload in payloads).encode()
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    reader, events = EventReader(), []
    for a, b in pairwise(edges):
        events += reader.feed(stream[a:b])
    assert [event.decode() for event in events] == payloads
    assert not reader.pending


def test_event_data_of_several_lines_and_without_a_space() -> None:
    reader = EventReader()
    assert reader.feed(b"data:{\ndata: }\n\ndata: half") == [b"{\n}"]
    assert reader.pending


def test_a_body_that_is_no_event_stream_is_refused() -> None:
    with pytest.raises(BadEvents, match="<html>"):
        EventReader().feed(b"<html>\n")
