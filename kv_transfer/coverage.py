"""Which rectangle of a lease's KV has arrived: pure geometry of segments over layers x logical blocks.

Called by the decode end only. The segments of one lease are kept disjoint by `accepts`, so that `is_complete` is a sum.
"""

from __future__ import annotations

from collections.abc import Iterable

from kv_transfer.messages import Segment


def overlaps(a: Segment, b: Segment) -> bool:
    layers = a.layer_start < b.layer_end and b.layer_start < a.layer_end
    blocks = a.block_start < b.block_end and b.block_start < a.block_end
    return layers and blocks


def inside(segment: Segment, num_layers: int, first_block: int, num_blocks: int) -> bool:
    """Not empty and within layers [0, num_layers) and blocks [first_block, num_blocks)."""
    layers = 0 <= segment.layer_start < segment.layer_end <= num_layers
    blocks = first_block <= segment.block_start < segment.block_end <= num_blocks
    return layers and blocks


def accepts(taken: Iterable[Segment], segment: Segment, num_layers: int, first_block: int, num_blocks: int) -> bool:
    """Whether `segment` belongs to the wanted rectangle and touches nothing of it a second time."""
    wanted = inside(segment, num_layers, first_block, num_blocks)
    return wanted and not any(overlaps(segment, other) for other in taken)


def is_complete(received: Iterable[Segment], num_layers: int, first_block: int, num_blocks: int) -> bool:
    """Whether accepted, hence disjoint, segments fill layers x [first_block, num_blocks)."""
    area = sum(segment.num_layers * segment.num_blocks for segment in received)
    return area == num_layers * (num_blocks - first_block)
