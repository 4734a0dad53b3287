"""How a modelled prompt is cut: one layer, one block per chunk."""

from __future__ import annotations

from kv_transfer.messages import Segment
from tests.transfer.explorer.config import RequestSpec


def segment_of(spec: RequestSpec, chunk: int) -> Segment:
    block = spec.cached + chunk
    return Segment(0, 1, block, block + 1)
