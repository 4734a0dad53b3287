"""Each output position passes once and in order, whatever order and however often the pieces arrive."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from router.token_fence import TokenFence


@st.composite
def shuffled_stream(draw: st.DrawFn) -> tuple[int, list[int], list[tuple[int, list[int], str]]]:
    """(first position, tokens, pieces): pieces cover all tokens, shuffled, some of them twice."""
    first = draw(st.integers(0, 5))
    tokens = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
    cuts = sorted(draw(st.sets(st.integers(1, len(tokens)))) | {0, len(tokens)})
    pieces = [(first + start, tokens[start:end], "stop" if end == len(tokens) else "") for start, end in pairwise(cuts)]
    repeated = pieces + draw(st.lists(st.sampled_from(pieces), max_size=4))
    return first, tokens, draw(st.permutations(repeated))


@given(shuffled_stream())
def test_any_order_with_repeats_gives_the_stream_once(
    stream: tuple[int, list[int], list[tuple[int, list[int], str]]],
) -> None:
    first, tokens, pieces = stream
    fence = TokenFence(first, first + 100)
    out: list[int] = []
    reasons: list[str | None] = []
    for position, ids, reason in pieces:
        released, finish = fence.accept(position, ids, reason)
        out.extend(released)
        reasons.append(finish)
        assert out == tokens[: len(out)]
        assert (finish == "stop") == (len(out) == len(tokens))
    assert out == tokens
    assert fence.num_waiting == 0


def test_tokens_of_earlier_attempts_are_dropped() -> None:
    fence = TokenFence(3, 10)
    assert fence.accept(1, [11, 12, 13, 14], "") == ((13, 14), None)


def test_a_gap_holds_the_finish_back() -> None:
    fence = TokenFence(0, 10)
    assert fence.accept(1, [8, 9], "length") == ((), None)
    assert fence.accept(0, [7], "") == ((7, 8, 9), "length")


def test_no_token_passes_the_limit() -> None:
    fence = TokenFence(0, 2)
    assert fence.accept(0, [1, 2, 3, 4], "") == ((1, 2), "length")
    assert fence.num_waiting == 0


def test_far_positions_are_not_kept() -> None:
    fence = TokenFence(0, 4)
    fence.accept(1_000_000, [5], "")
    assert fence.num_waiting == 0


def test_nothing_passes_behind_the_finish() -> None:
    fence = TokenFence(0, 10)
    assert fence.accept(2, [9], "") == ((), None)
    assert fence.accept(0, [7], "stop") == ((7,), "stop")
    assert fence.accept(1, [8], "") == ((), "stop")
