"""Tells the ports which KV of hand-overs a step writes, as soon as it is launched. Engine thread."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.engine.batch import PrefillSegment
from baton.engine.ports import Ports, SegmentWritten
from baton.engine.runner import OnLayerGroup
from baton.engine.segments import completed_blocks


def announcer(ports: Ports, hand_overs: Sequence[PrefillSegment], block_size: int) -> OnLayerGroup:
    """For `Runner.launch`: layer group by layer group, the blocks of the hand-overs that the step completes."""
    ranges = [(segment.request, *completed_blocks(segment, block_size)) for segment in hand_overs]

    def on_layer_group(layer_start: int, layer_end: int, event: torch.cuda.Event | None) -> None:
        for request, start, end in ranges:
            if start < end:
                blocks = tuple(request.block_table[start:end])
                ports.on_layer_group(
                    SegmentWritten(request.request_id, layer_start, layer_end, start, end, blocks, event)
                )

    return on_layer_group
