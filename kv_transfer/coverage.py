"""Which rectangle of a lease's KV has arrived: pure geometry of segments over layers x logical blocks.

Called by the decode end only. The segments of one lease are kept disjoint by `accepts`, so that `is_complete` is a sum.
"""

from __future__ import annotations

from collections.abc import Iterable

from kv_transfer.messages import Segment


def overlaps_any(segment: Segment, others: Iterable[Segment]) -> bool:
    """Called for every chunk with all that the lease has: a loop over plain tuples takes a fifth of one by name."""
    layer_start, layer_end, block_start, block_end = segment
    for start, end, first, last in others:
        if start < layer_end and layer_start < end and first < block_end and block_start < last:
            return True
    return False


def inside(segment: Segment, num_layers: int, first_block: int, num_blocks: int) -> bool:
    """Not empty and within layers [0, num_layers) and blocks [first_block, num_blocks)."""
    layers = 0 <= segment.layer_start < segment.layer_end <= num_layers
    blocks = first_block <= segment.block_start < segment.block_end <= num_blocks
    return layers and blocks


def accepts(taken: Iterable[Segment], segment: Segment, num_layers: int, first_block: int, num_blocks: int) -> bool:
    """Whether `segment` belongs to the wanted rectangle and touches nothing of it a second time."""
    wanted = inside(segment, num_layers, first_block, num_blocks)
    return wanted and not overlaps_any(segment, taken)


def is_complete(received: Iterable[Segment], num_layers: int, first_block: int, num_blocks: int) -> bool:
    """Whether accepted, hence disjoint, segments fill layers x [first_block, num_blocks)."""
    area = sum(segment.num_layers * segment.num_blocks for segment in received)
    return area == num_layers * (num_blocks - first_block)
