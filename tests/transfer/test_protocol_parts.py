"""The pure parts under the protocol: coverage of a lease by segments, staging slots, immutable maps."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.coverage import NOTHING, Coverage, add, inside, is_complete, meets, overlap
from kv_transfer.frozen_map import FrozenMap, FrozenTable
from kv_transfer.messages import Segment
from kv_transfer.slots import SlotPool

SIZE = 4


def cells(segment: Segment) -> set[tuple[int, int]]:
    layers = range(segment.layer_start, segment.layer_end)
    return set(product(layers, range(segment.block_start, segment.block_end)))


edges = st.integers(-1, SIZE + 1)
segments = st.builds(Segment, edges, edges, edges, edges)


def covered_cells(covered: Coverage) -> set[tuple[int, int]]:
    return {
        (layer, block)
        for start, end, bands in covered
        for band in bands
        for layer in range(*band)
        for block in range(start, end)
    }


def accepted(offered: list[Segment], layers: int, first: int) -> tuple[Coverage, list[Segment]]:
    """What the decode end keeps of what is offered to it, in this order."""
    covered, taken = NOTHING, []
    for segment in offered:
        if inside(segment, layers, first, SIZE) and not meets(covered, segment):
            covered = add(covered, segment)
            taken.append(segment)
    return covered, taken


@given(segments, segments)
def test_overlap_means_a_common_cell(a: Segment, b: Segment) -> None:
    if cells(a) and cells(b):
        assert overlap(a, b) == bool(cells(a) & cells(b))


@given(st.lists(segments, max_size=12), st.integers(0, SIZE), st.integers(1, SIZE))
def test_what_fits_is_accepted_and_complete_exactly_when_it_tiles(
    offered: list[Segment], first: int, layers: int
) -> None:
    covered, seen = NOTHING, set[tuple[int, int]]()
    wanted = cells(Segment(0, layers, first, SIZE))
    for segment in offered:
        fits = bool(cells(segment)) and cells(segment) <= wanted and not cells(segment) & seen
        assert (inside(segment, layers, first, SIZE) and not meets(covered, segment)) == fits
        if fits:
            covered = add(covered, segment)
            seen |= cells(segment)
        assert covered_cells(covered) == seen
        assert is_complete(covered, layers, first, SIZE) == (seen == wanted)


@given(st.lists(segments, max_size=12), st.data())
def test_equal_coverage_is_equal_whatever_it_was_made_of(offered: list[Segment], data: st.DataObject) -> None:
    covered, taken = accepted(offered, SIZE, 0)
    again, _ = accepted(data.draw(st.permutations(taken)), SIZE, 0)
    assert again == covered
    one_by_one = [Segment(layer, layer + 1, block, block + 1) for layer, block in sorted(covered_cells(covered))]
    assert accepted(one_by_one, SIZE, 0)[0] == covered


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data()
)
def test_any_tiling_in_any_order_is_complete_only_with_its_last_tile(
    layer_sizes: list[int], block_sizes: list[int], data: st.DataObject
) -> None:
    layer_cuts = [sum(layer_sizes[:i]) for i in range(len(layer_sizes) + 1)]
    block_cuts = [sum(block_sizes[:i]) for i in range(len(block_sizes) + 1)]
    tiles = [
        Segment(layer_cuts[i], layer_cuts[i + 1], block_cuts[j], block_cuts[j + 1])
        for i, j in product(range(len(layer_sizes)), range(len(block_sizes)))
    ]
    size, covered = (layer_cuts[-1], 0, block_cuts[-1]), NOTHING
    for tile in data.draw(st.permutations(tiles)):
        assert inside(tile, *size)
        assert not meets(covered, tile)
        assert not is_complete(covered, *size)
        covered = add(covered, tile)
    assert is_complete(covered, *size)


def test_a_prompt_that_comes_block_after_block_stays_short() -> None:
    covered = NOTHING
    for step in range(100):
        for group in range(4):
            covered = add(covered, Segment(group, group + 1, step, step + 1))
            assert len(covered) <= 2
    assert is_complete(covered, 4, 0, 100)


def test_slots_of_a_dead_epoch_return_only_when_it_is_destroyed() -> None:
    fresh: SlotPool[str] = SlotPool()
    slot, pool = fresh.open_epoch(3).take()
    pool = pool.lose_epoch("e1", (slot,), ("x",)).open_epoch(3)
    assert pool.free == (1, 2)
    assert pool.pinned("x")
    assert pool.num_quarantined == 1
    pool = pool.destroyed("e1")
    assert pool.free == (0, 1, 2)
    assert not pool.pinned("x")


def test_a_smaller_window_keeps_old_slots_out() -> None:
    fresh: SlotPool[str] = SlotPool()
    pool = fresh.open_epoch(3).lose_epoch("e1", (2,), ()).open_epoch(2)
    assert pool.destroyed("e1").free == (0, 1)


@pytest.mark.parametrize("kind", [FrozenMap, FrozenTable])
@given(entries=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3))), gone=st.integers(0, 40))
def test_frozen_maps_behave_like_a_dict_and_never_change(
    kind: type[Any], entries: list[tuple[int, int]], gone: int
) -> None:
    frozen = kind()
    for key, value in entries:
        before, snapshot = frozen, dict(frozen.items())
        frozen = frozen.set(key, value)
        assert dict(before.items()) == snapshot
    assert dict(frozen.items()) == dict(entries)
    assert {key: frozen[key] for key in frozen} == dict(entries)
    assert all(frozen.get(key) == frozen[key] for key in frozen)
    assert len(frozen) == len(frozen.values()) == len(dict(entries))
    expected = {key: value for key, value in dict(entries).items() if key != gone}
    assert frozen.discard(gone) == kind(expected)
    assert gone not in frozen.discard(gone)
    assert dict(frozen.items()) == dict(entries)


@pytest.mark.parametrize("kind", [FrozenMap, FrozenTable])
@given(entries=st.dictionaries(st.integers(0, 200), st.integers(0, 3)), data=st.data())
def test_frozen_maps_are_equal_and_hash_alike_whatever_their_past(
    kind: type[Any], entries: dict[int, int], data: st.DataObject
) -> None:
    built = kind()
    for key in data.draw(st.permutations(sorted(entries))):
        built = built.set(key, 9).set(key + 1000, 9).set(key, entries[key]).discard(key + 1000)
    assert built == kind(entries)
    assert hash(built) == hash(kind(entries))
    assert built.set(500, 1) != built
    assert hash(built.set(500, 1)) != hash(built)


def test_a_frozen_map_refuses_to_change() -> None:
    frozen = FrozenMap({1: 2})
    with pytest.raises(TypeError):
        frozen[1] = 3
    with pytest.raises(TypeError):
        frozen.update({3: 4})
    with pytest.raises(TypeError):
        del frozen[1]
    with pytest.raises(TypeError):
        frozen.pop(1)
    assert frozen == {1: 2}
