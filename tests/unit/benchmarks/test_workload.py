"""Workloads: the drawn lengths, the shared prefixes, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.common.errors import ConfigError
from benchmarks.serve.lengths import Exponential, Fixed, Uniform, parse_lengths
from benchmarks.serve.options import token_range, workload_settings
from benchmarks.serve.tokens import Domain, TokenSource
from benchmarks.serve.trace import PIECE_TOKENS, TraceRow, load_trace, trace_prompt
from benchmarks.serve.workload import Workload, plan_workload


def planned(name: str | None = None, **changes: object) -> Workload:
    flags: dict[str, object] = {
        "input_len": None,
        "output_len": None,
        "trace": None,
        "time_scale": 1.0,
        "count": None,
        "max_total_tokens": None,
        "seed": None,
        "token_ids": (10, 1000),
    }
    return plan_workload(workload_settings(name=name, **(flags | changes)))  # type: ignore[arg-type]


def write_trace(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def row(timestamp: int, length: int, hash_ids: list[int], output: int = 3) -> dict[str, object]:
    return {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": hash_ids}


def test_mixed_draws_all_inputs_then_all_outputs() -> None:
    """The peers' published figure for this workload is of 144,160 output tokens."""
    rng = random.Random(0)
    inputs = [rng.randint(100, 1024) for _ in range(256)]
    requests = planned("mixed").requests
    assert [request.input_length for request in requests] == inputs
    assert sum(request.output_length for request in requests) == 144_160


def test_spread_is_the_published_workload() -> None:
    requests = planned("spread").requests
    assert {request.input_length for request in requests} == {512}
    assert sum(request.output_length for request in requests) == 67_907
    assert max(request.output_length for request in requests) <= 1536


def test_flags_override_a_preset_and_its_name() -> None:
    workload = planned("fixed", output_len="7", count=3)
    assert [(request.input_length, request.output_length) for request in workload.requests] == [(1024, 7)] * 3
    assert workload.settings.name == "lengths"


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 2**32))
def test_uniform_reaches_both_ends_only(low: int, width: int, seed: int) -> None:
    lengths, rng = Uniform(low, low + width), random.Random(seed)
    drawn = {lengths.draw(rng) for _ in range(50)}
    assert min(drawn) >= low
    assert max(drawn) <= low + width


def test_exponential_has_its_mean_and_cap() -> None:
    rng = random.Random(1)
    drawn = [Exponential(128.0, 400).draw(rng) for _ in range(20_000)]
    assert max(drawn) == 400
    assert min(drawn) == 1
    expected = 128.0 * (1 - np.exp(-400 / 128.0))
    assert abs(np.mean(drawn) - expected) < 3.0


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("5", Fixed(5)), ("5:9", Uniform(5, 9)), ("exp:1.5:9", Exponential(1.5, 9))],
)
def test_length_forms(text: str, lengths: object) -> None:
    assert parse_lengths(text, "--input-len") == lengths


@pytest.mark.parametrize("text", ["0", "9:5", "exp:0:5", "exp:nan:5", "exp:5:0", "a", "1:2:3", "", "-3"])
def test_bad_lengths_name_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--output-len"):
        parse_lengths(text, "--output-len")


def test_prompts_stay_in_range_differ_by_run_and_repeat_by_seed() -> None:
    workload = planned(None, input_len="64", output_len="1", count=4, token_ids=(100, 164))
    first, again, second = workload.prompts(1), workload.prompts(1), workload.prompts(2)
    assert all(len(prompt) == 64 for prompt in first)
    ids = np.concatenate(first)
    assert ids.min() >= 100
    assert ids.max() < 164
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a in first for b in second)
    assert len(workload.prompts(1, 2)) == 2


def test_token_ids_are_the_same_everywhere() -> None:
    """Philox output is specified: a change here would make results incomparable."""
    assert (
        TokenSource(7, 0, 1000).draw(Domain.PIECE, 3, 4).tolist()
        == TokenSource(7, 0, 1000).draw(Domain.PIECE, 3, 512).tolist()[:4]
    )
    assert (
        TokenSource(7, 0, 1000).draw(Domain.PROMPT, 3, 4).tolist()
        != TokenSource(7, 0, 1000).draw(Domain.PIECE, 3, 4).tolist()
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_equal_hash_ids_are_equal_pieces_and_no_others(one: list[int], two: list[int]) -> None:
    source = TokenSource(0, 0, 1 << 20)
    a, b = (trace_prompt(TraceRow(0, len(ids) * PIECE_TOKENS, 1, tuple(ids)), source) for ids in (one, two))
    for position, (left, right) in enumerate(zip(one, two, strict=False)):
        piece = slice(position * PIECE_TOKENS, (position + 1) * PIECE_TOKENS)
        assert np.array_equal(a[piece], b[piece]) == (left == right)


def test_a_trace_shares_prefixes_within_a_run_and_cuts_the_last_piece(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", [row(500, 600, [0, 1]), row(1500, 1030, [0, 1, 9], output=8)])
    workload = planned(trace=path, time_scale=0.5)
    short, long = workload.prompts(1)
    assert [len(short), len(long)] == [600, 1030]
    assert np.array_equal(short, long[:600])
    assert not np.array_equal(short, workload.prompts(2)[0])
    assert [request.trace_time for request in workload.requests] == [0.0, 0.5]
    assert [request.output_length for request in workload.requests] == [3, 8]


def test_limit_and_longest_are_honoured_and_reported(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", [row(i, 100 * (i + 1), [i]) for i in range(5)])
    workload = planned(trace=path, count=4, max_total_tokens=303)
    assert [request.input_length for request in workload.requests] == [100, 200, 300]
    assert workload.left_out == 1
    with pytest.raises(ConfigError, match="--max-total-tokens"):
        planned(trace=path, max_total_tokens=5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}', "hash_ids"),
        (json.dumps(row(9, 513, [1])), "cannot fill"),
        (json.dumps(row(9, 0, [])), "at least 1"),
        (json.dumps(row(0, 5, [1])), "go back"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = write_trace(tmp_path / "t.jsonl", [row(1, 5, [1])])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=message):
        load_trace(path, None)


def test_a_missing_or_empty_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        with pytest.raises(ConfigError, match="--trace"):
            load_trace(tmp_path / name, None)


def test_token_range_keeps_off_the_first_ids_unless_told() -> None:
    assert token_range(None, 32000) == (10, 32000)
    assert token_range(None, 4) == (3, 4)
    assert token_range("0:5", 5) == (0, 5)
    for text in ("0:6", "3:3", "-1:2", "3", "a:b"):
        with pytest.raises(ConfigError, match="--token-ids"):
            token_range(text, 5)


def test_a_trace_excludes_lengths_and_lengths_need_a_count(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--trace"):
        planned("mixed", trace=tmp_path / "t.jsonl")
    with pytest.raises(ConfigError, match="--workload"):
        planned(None, input_len="5", output_len="5")
    with pytest.raises(ConfigError, match="none of fixed, mixed"):
        planned("huge")
