"""Segments, tensor-parallel resharding, and what one rank sends another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.messages import Segment
from kv_transfer.plan import ONE_RANK, Shard, Sharding, messages_of, reshard, shares_between, split_segments


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 300), st.integers(1, 300), st.integers(1, 400))
def test_segments_cover_each_cell_once_and_fit(
    layer_start: int, num_layers: int, block_start: int, num_blocks: int, capacity: int
) -> None:
    block_bytes = 96
    segments = split_segments(
        layer_start,
        layer_start + num_layers,
        block_start,
        block_start + num_blocks,
        block_bytes,
        capacity * block_bytes + 95,
    )
    cells = [
        (layer, block)
        for segment in segments
        for layer in range(segment.layer_start, segment.layer_end)
        for block in range(segment.block_start, segment.block_end)
    ]
    assert len(cells) == len(set(cells)) == num_layers * num_blocks
    assert set(cells) == {
        (layer, block)
        for layer in range(layer_start, layer_start + num_layers)
        for block in range(block_start, block_start + num_blocks)
    }
    assert max(segment.num_layers * segment.num_blocks for segment in segments) <= capacity


def test_layers_of_a_group_travel_together_when_a_block_of_them_fits() -> None:
    segments = split_segments(4, 8, 0, 10, block_bytes_per_layer=100, slot_bytes=1600)
    assert [(s.layer_start, s.layer_end, s.num_blocks) for s in segments] == [(4, 8, 4), (4, 8, 3), (4, 8, 3)]


def test_of_many_messages_the_first_and_the_last_are_short() -> None:
    sizes = {
        blocks: [s.num_blocks for s in split_segments(0, 2, 0, blocks, block_bytes_per_layer=100, slot_bytes=1600)]
        for blocks in (8, 32, 33, 512)
    }
    assert sizes[8] == [8]
    assert sizes[32] == [8] * 4
    assert sizes[33] == [2, 8, 7, 7, 7, 2]
    assert sizes[512] == [2, *[8] * 60, *[7] * 4, 2]


def test_a_slot_smaller_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than one block"):
        split_segments(0, 1, 0, 1, block_bytes_per_layer=100, slot_bytes=99)


@pytest.mark.parametrize("bounds", [(1, 1, 0, 1), (0, 1, 2, 2)])
def test_an_empty_rectangle_is_refused(bounds: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no KV"):
        split_segments(*bounds, block_bytes_per_layer=1, slot_bytes=1)


@st.composite
def shardings(draw: st.DrawFn) -> tuple[Sharding, Sharding, int, int]:
    num_kv_heads = draw(st.sampled_from([1, 2, 4, 8, 6]))
    num_layers = draw(st.integers(1, 12))
    sizes = [size for size in range(1, 17) if num_kv_heads % size == 0 or size % num_kv_heads == 0]
    source, target = (
        Sharding(draw(st.sampled_from(sizes)), draw(st.integers(1, min(num_layers, 4)))) for _ in range(2)
    )
    return source, target, num_layers, num_kv_heads


@given(shardings())
def test_each_target_gets_each_of_its_cells_once_from_a_rank_that_holds_it(
    case: tuple[Sharding, Sharding, int, int],
) -> None:
    source, target, num_layers, num_kv_heads = case
    received: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(target.num_ranks)}
    for transfer in reshard(source, target, num_layers, num_kv_heads):
        held = source.shard(transfer.source, num_layers, num_kv_heads)
        for layer in range(transfer.shard.layer_start, transfer.shard.layer_end):
            for head in range(transfer.shard.head_start, transfer.shard.head_end):
                assert held.layer_start <= layer < held.layer_end
                assert held.head_start <= head < held.head_end
                received[transfer.target].append((layer, head))
    for rank, cells in received.items():
        shard = target.shard(rank, num_layers, num_kv_heads)
        wanted = {
            (layer, head)
            for layer in range(shard.layer_start, shard.layer_end)
            for head in range(shard.head_start, shard.head_end)
        }
        assert wanted
        assert sorted(cells) == sorted(wanted)


@given(shardings())
def test_every_cell_is_held_by_some_rank(case: tuple[Sharding, Sharding, int, int]) -> None:
    sharding, _, num_layers, num_kv_heads = case
    held = {
        (layer, head)
        for shard in (sharding.shard(rank, num_layers, num_kv_heads) for rank in range(sharding.num_ranks))
        for layer in range(shard.layer_start, shard.layer_end)
        for head in range(shard.head_start, shard.head_end)
    }
    assert held == {(layer, head) for layer in range(num_layers) for head in range(num_kv_heads)}


def test_replicas_take_turns() -> None:
    transfers = reshard(Sharding(8), Sharding(4), num_layers=2, num_kv_heads=2)
    assert [(t.source, t.target) for t in transfers] == [(0, 0), (1, 1), (4, 2), (5, 3)]


@pytest.mark.parametrize("sharding", [Sharding(3), Sharding(1, 5), Sharding(0)])
def test_a_model_that_cannot_be_shared_like_this_is_refused(sharding: Sharding) -> None:
    with pytest.raises(ValueError, match="cannot be shared"):
        sharding.shard(0, num_layers=4, num_kv_heads=4)


def test_workers_of_one_rank_exchange_everything_as_one_share() -> None:
    assert shares_between(ONE_RANK, 0, ONE_RANK, 0, 32, 8) == [Shard(0, 32, 0, 8)]


def test_a_share_of_some_heads_is_refused_until_it_can_be_packed() -> None:
    with pytest.raises(ValueError, match="8 KV heads"):
        shares_between(Sharding(2), 0, ONE_RANK, 0, 32, 8)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 11), st.integers(1, 12), st.integers(1, 8))
def test_all_source_ranks_together_send_what_a_layer_group_holds_once(
    source_stages: int, target_stages: int, layer_start: int, num_layers: int, capacity: int
) -> None:
    source, target = Sharding(1, source_stages), Sharding(1, target_stages)
    written = Segment(layer_start, min(12, layer_start + num_layers), 3, 9)
    sent = [
        (layer, block)
        for source_rank in range(source_stages)
        for target_rank in range(target_stages)
        for piece in messages_of(
            shares_between(source, source_rank, target, target_rank, 12, 2), written, 64, 64 * capacity
        )
        for layer in range(piece.layer_start, piece.layer_end)
        for block in range(piece.block_start, piece.block_end)
    ]
    wanted = [(layer, block) for layer in range(written.layer_start, written.layer_end) for block in range(3, 9)]
    assert sorted(sent) == wanted
