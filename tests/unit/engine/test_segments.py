"""However a prompt is chunked, each block of each layer group is announced once, and not before it is full."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from baton.common.sampling import SamplingParams
from baton.engine.batch import PrefillSegment
from baton.engine.request import Request
from baton.engine.segments import completed_blocks, split_layers


@given(num_layers=st.integers(1, 80), num_groups=st.integers(1, 100))
def test_layer_groups_cover_all_layers(num_layers: int, num_groups: int) -> None:
    groups = split_layers(num_layers, num_groups)
    assert [layer for start, end in groups for layer in range(start, end)] == list(range(num_layers))
    assert len(groups) == min(num_layers, num_groups)
    sizes = [end - start for start, end in groups]
    if len(groups) > 1:
        assert sizes[-1] == 1
        assert max(sizes[:-1]) - min(sizes[:-1]) <= 1


def test_layer_groups_of_a_large_model() -> None:
    assert split_layers(32, 4) == ((0, 10), (10, 20), (20, 31), (31, 32))
    assert split_layers(2, 4) == ((0, 1), (1, 2))


@given(
    num_tokens=st.integers(1, 200),
    cuts=st.sets(st.integers(1, 199)),
    num_cached_blocks=st.integers(0, 12),
    first_block_to_send=st.integers(0, 13),
    block_size=st.sampled_from([16, 32]),
)
def test_each_block_once(
    num_tokens: int, cuts: set[int], num_cached_blocks: int, first_block_to_send: int, block_size: int
) -> None:
    request = Request("a", [0] * num_tokens, SamplingParams(max_tokens=1), 0.0, hand_over=True)
    request.first_block_to_send = first_block_to_send
    request.num_cached_tokens = min(num_cached_blocks, (num_tokens - 1) // block_size) * block_size
    bounds = sorted(
        {request.num_cached_tokens, num_tokens, *(c for c in cuts if request.num_cached_tokens < c < num_tokens)}
    )
    announced: list[int] = []
    for start, end in pairwise(bounds):
        first, last = completed_blocks(PrefillSegment(request, start, end), block_size)
        announced += range(first, last)
        assert all((block + 1) * block_size <= end or end == num_tokens for block in range(first, last))
    assert announced == list(range(first_block_to_send, -(-num_tokens // block_size)))
