"""The pure parts under the protocol: coverage of a lease by segments, staging slots, immutable maps."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.coverage import accepts, is_complete, overlaps_any
from kv_transfer.frozen_map import FrozenMap
from kv_transfer.messages import Segment
from kv_transfer.slots import SlotPool

SIZE = 4


def cells(segment: Segment) -> set[tuple[int, int]]:
    layers = range(segment.layer_start, segment.layer_end)
    return set(product(layers, range(segment.block_start, segment.block_end)))


edges = st.integers(-1, SIZE + 1)
segments = st.builds(Segment, edges, edges, edges, edges)


@given(segments, segments)
def test_overlap_means_a_common_cell(a: Segment, b: Segment) -> None:
    if cells(a) and cells(b):
        assert overlaps_any(a, [b]) == bool(cells(a) & cells(b))


@given(st.lists(segments, max_size=12), st.integers(0, SIZE), st.integers(1, SIZE))
def test_accepted_segments_are_complete_exactly_when_they_tile(offered: list[Segment], first: int, layers: int) -> None:
    taken: list[Segment] = []
    seen: set[tuple[int, int]] = set()
    wanted = cells(Segment(0, layers, first, SIZE))
    for segment in offered:
        fits = bool(cells(segment)) and cells(segment) <= wanted and not cells(segment) & seen
        assert accepts(taken, segment, layers, first, SIZE) == fits
        if fits:
            taken.append(segment)
            seen |= cells(segment)
        assert is_complete(taken, layers, first, SIZE) == (seen == wanted)


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
    order = data.draw(st.permutations(tiles))
    size = (layer_cuts[-1], 0, block_cuts[-1])
    for count, tile in enumerate(order):
        assert accepts(order[:count], tile, *size)
        assert not is_complete(order[:count], *size)
    assert is_complete(order, *size)


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


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3))), st.integers(0, 3))
def test_frozen_map_behaves_like_a_dict_and_never_changes(entries: list[tuple[int, int]], gone: int) -> None:
    frozen: FrozenMap[int, int] = FrozenMap()
    for key, value in entries:
        before, snapshot = frozen, dict(frozen.items())
        frozen = frozen.set(key, value)
        assert dict(before.items()) == snapshot
    assert dict(frozen.items()) == dict(entries)
    expected = {key: value for key, value in dict(entries).items() if key != gone}
    assert frozen.discard(gone) == FrozenMap(expected)
    assert hash(frozen.discard(gone)) == hash(FrozenMap(dict(reversed(expected.items()))))
