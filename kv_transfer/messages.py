"""What prefill and decode say to each other, as plain values.

`wire.py` turns them into the frames of `protos/transfer.proto` and back; `protocol.py` consumes and produces them.
All are immutable and hashable, so that a state made of them can be compared and explored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class LeaseKey(NamedTuple):
    """Names one reservation of one decode worker process. Never reused by that process.

    `lease` grows by one per reservation. `generation` is the block pool's stamp when the blocks were taken, so a name
    that survived its blocks is recognised as stale (invariant I1).
    """

    lease: int
    generation: int


class Segment(NamedTuple):
    """A rectangle of KV: layers [layer_start, layer_end) of the prompt's logical blocks [block_start, block_end)."""

    layer_start: int
    layer_end: int
    block_start: int
    block_end: int

    @property
    def num_blocks(self) -> int:
        return self.block_end - self.block_start

    @property
    def num_layers(self) -> int:
        return self.layer_end - self.layer_start


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill to decode: the send with this sequence number is launched. `fingerprints` has one value per block."""

    seq: int
    lease: LeaseKey
    segment: Segment
    num_bytes: int
    fingerprints: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Prefill to decode: all KV of `num_tokens` prompt tokens has been sent in `num_chunks` chunks."""

    lease: LeaseKey
    num_tokens: int
    num_chunks: int
    first_token: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Prefill to decode: the request ended at its first token, nothing is left to decode."""

    lease: LeaseKey


@dataclass(frozen=True, slots=True)
class ChunksDone:
    """Decode to prefill: every chunk with seq < `through` is verified or dropped, its slot is free again."""

    through: int


@dataclass(frozen=True, slots=True)
class Committed:
    """Decode to prefill: the request is admitted, prefill may release its blocks."""

    lease: LeaseKey


@dataclass(frozen=True, slots=True)
class Abort:
    """Either way: the lease has ended without a commit, with the reason."""

    lease: LeaseKey
    reason: str


PrefillMessage = Chunk | Commit | Finish | Abort
DecodeMessage = ChunksDone | Committed | Abort
