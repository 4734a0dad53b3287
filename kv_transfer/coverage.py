"""Which part of a lease's KV has arrived: pure geometry of segments over layers x logical blocks.

Called by the decode end only. What has arrived is kept in one canonical form, as short as its outline is simple: a
prompt that comes block after block is at most a few runs, however many segments it came in.
"""

from __future__ import annotations

from kv_transfer.messages import Segment

Band = tuple[int, int]  # layers [start, end)
Run = tuple[int, int, tuple[Band, ...]]  # blocks [start, end) have these layers and no others
Coverage = tuple[Run, ...]  # in order, apart, and as long as possible; so are the bands of a run

NOTHING: Coverage = ()


def inside(segment: Segment, num_layers: int, first_block: int, num_blocks: int) -> bool:
    """Not empty and within layers [0, num_layers) and blocks [first_block, num_blocks)."""
    layer_start, layer_end, block_start, block_end = segment
    return 0 <= layer_start < layer_end <= num_layers and first_block <= block_start < block_end <= num_blocks


def overlap(a: Segment, b: Segment) -> bool:
    """Whether two segments that are not empty have a cell in common."""
    layers = a.layer_start < b.layer_end and b.layer_start < a.layer_end
    return layers and a.block_start < b.block_end and b.block_start < a.block_end


def meets(covered: Coverage, segment: Segment) -> bool:
    """Whether any cell of the segment is covered."""
    layer_start, layer_end, block_start, block_end = segment
    for start, end, bands in covered:
        if start < block_end and block_start < end:
            for first, last in bands:
                if first < layer_end and layer_start < last:
                    return True
    return False


def add(covered: Coverage, segment: Segment) -> Coverage:
    """With the segment, which is inside and does not meet what is covered."""
    layer_start, layer_end, first, last = segment
    band, runs, placed = (layer_start, layer_end), list[Run](), first  # up to block `placed` the segment lies in runs
    for run in covered:
        start, end, bands = run
        if end <= first:
            runs.append(run)
        elif (start, end) == (first, last):  # mostly: layers after layers of the same blocks
            _place(runs, first, last, _with_band(bands, band))
            placed = last
        elif start >= last:
            _place(runs, placed, last, (band,))
            _place(runs, start, end, bands)
            placed = last
        else:
            _place(runs, start, first, bands)
            _place(runs, placed, start, (band,))
            start, placed = max(start, first), min(end, last)
            _place(runs, start, placed, _with_band(bands, band))
            _place(runs, last, end, bands)
    if placed < last:
        _place(runs, placed, last, (band,))
    return tuple(runs)


def _place(runs: list[Run], start: int, end: int, bands: tuple[Band, ...]) -> None:
    """Append a run, unless it is empty; neighbours that have the same layers are one."""
    if start >= end:
        return
    if runs and runs[-1][1] == start and runs[-1][2] == bands:
        runs[-1] = (runs[-1][0], end, bands)
    else:
        runs.append((start, end, bands))


def _with_band(bands: tuple[Band, ...], band: Band) -> tuple[Band, ...]:
    merged: list[Band] = []
    for start, end in sorted((*bands, band)):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def is_complete(covered: Coverage, num_layers: int, first_block: int, num_blocks: int) -> bool:
    """Whether layers [0, num_layers) x blocks [first_block, num_blocks) are covered, and nothing else is."""
    return covered == (((first_block, num_blocks, ((0, num_layers),)),) if first_block < num_blocks else NOTHING)
