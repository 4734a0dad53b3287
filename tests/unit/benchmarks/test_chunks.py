"""How tokens are counted from chunks, for each thing a server may offer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.serve.chunks import CompletionReader, StreamFault
from benchmarks.serve.records import Counting, Failure, RequestRecord


def read(counting: Counting, *chunks: dict[str, Any] | str) -> tuple[RequestRecord, set[Counting]]:
    """Chunk i arrives at time i."""
    record = RequestRecord(0, 4, 8)
    reader = CompletionReader(record, counting)
    for time, chunk in enumerate((*chunks, "[DONE]")):
        reader.feed((chunk if isinstance(chunk, str) else json.dumps(chunk)).encode(), float(time))
    reader.close()
    return record, reader.counted_by


def chunk(text: str = "x", finish: str | None = None, total: int | None = None, **more: Any) -> dict[str, Any]:
    usage = {} if total is None else {"usage": {"prompt_tokens": 4, "completion_tokens": total}}
    return {"id": "cmpl-7", "choices": [{"index": 0, "text": text, "finish_reason": finish, **more}], **usage}


def usage(total: int) -> dict[str, Any]:
    return {
        "choices": [],
        "usage": {"prompt_tokens": 4, "completion_tokens": total, "prompt_tokens_details": {"cached_tokens": 3}},
    }


def test_continuous_usage_counts_several_tokens_a_chunk() -> None:
    record, by = read(Counting.USAGE, chunk(total=1), chunk(total=4), chunk("", "length", total=4), usage(4))
    assert (record.chunk_times, record.chunk_tokens) == ([0.0, 1.0], [1, 3])
    assert (record.output_tokens, record.prompt_tokens, record.cached_tokens) == (4, 4, 3)
    assert (record.finish_reason, record.request_id) == ("length", "cmpl-7")
    assert by == {Counting.USAGE}


def test_token_ids_count_chunks_without_text() -> None:
    record, by = read(
        Counting.TOKEN_IDS, chunk(token_ids=[5]), chunk("", token_ids=[6, 7]), chunk("", "stop", token_ids=[])
    )
    assert (record.chunk_tokens, record.output_tokens) == ([1, 2], 3)
    assert by == {Counting.TOKEN_IDS}


def test_without_any_count_a_chunk_is_a_token_even_with_empty_text() -> None:
    record, by = read(Counting.CHUNKS, chunk(), chunk(""), chunk("y", "length"))
    assert (record.chunk_tokens, record.output_tokens) == ([1, 1, 1], 3)
    assert by == {Counting.CHUNKS}


@pytest.mark.parametrize(("total", "counted"), [(2, 2), (3, 3), (9, 2)])
def test_a_finish_without_text_is_a_token_only_if_the_usage_says_so(total: int, counted: int) -> None:
    record, _ = read(Counting.CHUNKS, chunk(), chunk(), chunk("", "length"), usage(total))
    assert sum(record.chunk_tokens) == counted
    assert record.output_tokens == total


def test_a_server_that_ignores_the_question_is_found_out() -> None:
    assert read(Counting.USAGE, chunk(), chunk("", "stop"), usage(1))[1] == {Counting.CHUNKS}
    assert read(Counting.TOKEN_IDS, chunk(), usage(1))[1] == {Counting.CHUNKS}


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        ("{", Failure.BAD_EVENTS),
        ("[1]", Failure.BAD_EVENTS),
        ('{"choices": 3}', Failure.BAD_EVENTS),
        ('{"choices": [3]}', Failure.BAD_EVENTS),
        ('{"choices": [], "usage": {"completion_tokens": 1}}', Failure.BAD_EVENTS),
        ('{"error": {"message": "worker lost"}}', Failure.SERVER_ERROR),
    ],
)
def test_bad_chunks_have_a_kind(payload: str, kind: Failure) -> None:
    with pytest.raises(StreamFault) as raised:
        read(Counting.CHUNKS, payload)
    assert raised.value.kind is kind


def test_a_count_that_goes_back_is_an_error() -> None:
    with pytest.raises(StreamFault, match="went back"):
        read(Counting.USAGE, chunk(total=3), chunk(total=2))


def test_no_token_and_no_end_are_failures() -> None:
    with pytest.raises(StreamFault) as raised:
        read(Counting.CHUNKS, usage(0))
    assert raised.value.kind is Failure.NO_TOKENS
    with pytest.raises(StreamFault) as raised:
        CompletionReader(RequestRecord(0, 1, 1), Counting.CHUNKS).close()
    assert raised.value.kind is Failure.INCOMPLETE
