"""Which part of a hand-over's KV a step completes. Pure: no torch, no state.

A prefill is announced in segments, layer group by layer group, as soon as blocks are full, so that the transfer runs
under the compute. Each (block, layer group) of [first_block_to_send, end of the prompt) is announced exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from baton.engine.batch import PrefillSegment


def split_layers(num_layers: int, num_groups: int) -> tuple[tuple[int, int], ...]:
    """Cut [0, num_layers) into at most `num_groups` ranges, as even as can be.

    With more than one group the last is a single layer: it is what remains to be sent when the compute has ended.
    """
    groups = min(num_groups, num_layers)
    if groups == 1:
        return ((0, num_layers),)
    bounds = [number * (num_layers - 1) // (groups - 1) for number in range(groups)]
    return (*pairwise(bounds), (num_layers - 1, num_layers))


def num_completed_blocks(segments: Iterable[PrefillSegment], block_size: int) -> int:
    """How many blocks a step announces for these hand-overs."""
    ranges = (completed_blocks(segment, block_size) for segment in segments)
    return sum(max(0, end - start) for start, end in ranges)


def completed_blocks(segment: PrefillSegment, block_size: int) -> tuple[int, int]:
    """The logical blocks [start, end) to announce with this chunk; empty when start >= end.

    The first chunk also announces what the prefix cache already held; the last one also the block that is not full.
    """
    first = 0 if segment.is_first else segment.start // block_size
    end = -(-segment.end // block_size) if segment.is_last else segment.end // block_size
    return max(first, segment.request.first_block_to_send), end
