"""What one step computes: the scheduler's choice, and the flat arrays that the runner feeds to the model.

A step is one ragged batch: one token of every decoding request first, then the chosen prefill segments, each in one
piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from baton.engine.request import Request
from baton.engine.table_mirror import TableMirror


@dataclass(frozen=True, slots=True)
class PrefillSegment:
    """Tokens [start, end) of a request's prompt, to be computed in this step."""

    request: Request
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def is_first(self) -> bool:
        return self.start == self.request.num_cached_tokens

    @property
    def is_last(self) -> bool:
        return self.end == self.request.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A scheduler's choice. Every request in it has the blocks for the tokens that it computes.

    `copies`: (source, copy) of blocks whose KV is to be copied before anything is computed.
    """

    decodes: tuple[Request, ...] = ()
    prefills: tuple[PrefillSegment, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.prefills)

    def requests(self) -> Iterator[Request]:
        yield from self.decodes
        yield from (segment.request for segment in self.prefills)

    def sampled(self) -> list[Request]:
        """The requests that get a token from this step, in the order of `Batch.sample_rows`."""
        return [*self.decodes, *(segment.request for segment in self.prefills if segment.is_last)]


@dataclass(frozen=True, slots=True)
class Batch:
    """A step as arrays. Rows are tokens; sequences are the decodes, then the prefill segments.

    input_ids, positions, slot_mapping: int64 [num_tokens]; cu_seqlens_q: int32 [num_seqs + 1];
    context_lens: int32 [num_seqs]; block_tables: int32 [num_seqs, max_blocks], anything past a context;
    sample_rows: int64 [num_sampled], the token rows whose logits are needed; draw_positions: int64 [num_sampled],
    where in their sequences the drawn tokens will stand; draw_rows: int64 [num_decodes], as in `draw_row`;
    fresh_rows: as in AttentionMetadata.
    """

    input_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slot_mapping: npt.NDArray[np.int64]
    cu_seqlens_q: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]
    sample_rows: npt.NDArray[np.int64]
    draw_positions: npt.NDArray[np.int64]
    draw_rows: npt.NDArray[np.int64]
    max_seqlen_q: int
    num_decodes: int
    num_prefills: int
    num_prefill_tokens: int
    fresh_rows: tuple[tuple[int, int], ...] = ()


def build_batch(step: ScheduledStep, block_size: int, tables: TableMirror | None = None) -> Batch:
    """Lay a step out as arrays. The step's requests are only read. `tables`: kept from step to step, it saves time."""
    spans = [(r, r.num_computed_tokens, r.num_computed_tokens + 1) for r in step.decodes]
    spans += [(segment.request, segment.start, segment.end) for segment in step.prefills]
    lens = np.array([end - start for _, start, end in spans], dtype=np.int32)
    cu_seqlens_q = np.zeros(len(spans) + 1, dtype=np.int32)
    np.cumsum(lens, out=cu_seqlens_q[1:])
    context_lens = np.array([end for _, _, end in spans], dtype=np.int32)
    max_blocks = -(-int(context_lens.max(initial=0)) // block_size)
    block_tables = (tables or TableMirror()).gather([request for request, _, _ in spans], max_blocks)
    sequence_of_row = np.repeat(np.arange(len(spans)), lens)
    rows = np.arange(int(cu_seqlens_q[-1]), dtype=np.int64)
    positions = rows - cu_seqlens_q[sequence_of_row] + (context_lens - lens)[sequence_of_row]
    blocks = block_tables[sequence_of_row, positions // block_size].astype(np.int64)
    is_sampled = np.array([True] * len(step.decodes) + [segment.is_last for segment in step.prefills], dtype=np.bool_)
    return Batch(
        input_ids=_input_ids(spans, len(rows)),
        positions=positions,
        slot_mapping=blocks * block_size + positions % block_size,
        cu_seqlens_q=cu_seqlens_q,
        context_lens=context_lens,
        block_tables=block_tables,
        sample_rows=cu_seqlens_q[1:][is_sampled].astype(np.int64) - 1,
        draw_positions=context_lens[is_sampled].astype(np.int64),
        draw_rows=np.array([draw_row(request) for request in step.decodes], dtype=np.int64),
        max_seqlen_q=max((segment.num_tokens for segment in step.prefills), default=1),
        num_decodes=len(step.decodes),
        num_prefills=len(step.prefills),
        num_prefill_tokens=step.num_prefill_tokens,
        fresh_rows=_fresh_rows(step, cu_seqlens_q),
    )


def _fresh_rows(step: ScheduledStep, cu_seqlens_q: npt.NDArray[np.int32]) -> tuple[tuple[int, int], ...]:
    if any(segment.start for segment in step.prefills):
        return ()
    bounds = cu_seqlens_q[len(step.decodes) :].tolist()
    return tuple(pairwise(bounds))


def draw_row(request: Request) -> int:
    """Where a decode's input token is: -1 when the request knows it, else its row in the draws of the last launch."""
    return -1 if request.num_computed_tokens < len(request.token_ids) else request.draw_row


def _input_ids(spans: list[tuple[Request, int, int]], num_tokens: int) -> npt.NDArray[np.int64]:
    input_ids = np.empty(num_tokens, dtype=np.int64)
    row = 0
    for request, start, end in spans:
        known = request.token_ids[start:end]
        input_ids[row : row + end - start] = known if len(known) == end - start else 0
        row += end - start
    return input_ids
