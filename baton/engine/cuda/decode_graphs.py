"""Steps that only decode, as captured CUDA graphs: one per size of batch, the rows beyond the batch padded.

A graph computes its inputs from one record per sequence, runs the model and takes the largest logit of every row; rows
that are drawn otherwise are drawn right behind it. Graphs share one pool of memory, so the largest is captured first.
Imported by name, on a GPU only.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch

from baton.engine.attention.base import AttentionMetadata
from baton.engine.batch import ScheduledStep, draw_row
from baton.engine.cuda.block_tables import BlockTableRows
from baton.engine.cuda.graph_pool import Captured, Compute, GraphPool
from baton.engine.kernels.decode_inputs import DecodeInputs, decode_inputs
from baton.engine.kernels.greedy import greedy_tokens
from baton.engine.request import Request
from baton.engine.runner import Runner
from baton.engine.staging import CudaStaging

logger = logging.getLogger(__name__)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then steps of 8 to 64, 16 to 256, 64 beyond; the last is `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 64)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class DecodeGraphs:
    """Implements `DecodePath`."""

    def __init__(self, runner: Runner, pool: GraphPool, max_num_seqs: int, max_blocks: int) -> None:
        device = runner.model.device
        self._runner = runner
        self._pool = pool
        self._block_size = runner.layout.block_size
        self._sizes = graph_sizes(max_num_seqs)
        self._staging = CudaStaging(device, 0)
        self._rows = BlockTableRows(max_num_seqs, max_blocks)
        self._tables = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device)
        self._records = torch.zeros(4 * max_num_seqs, dtype=torch.int64, device=device)
        self._inputs = DecodeInputs.allocate(max_num_seqs, max_blocks, device)
        self._starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._captured: dict[int, Captured] = {}
        self._last: tuple[Request, ...] = ()
        self._last_records = np.zeros((4, 0), dtype=np.int64)

    # ---- before the first step

    @torch.inference_mode()
    def measure(self) -> int:
        return self._pool.measure([self._capturable(size) for size in self._sizes[:-3:-1]], len(self._sizes))

    @torch.inference_mode()
    def prepare(self) -> None:
        started = time.monotonic()
        for size in reversed(self._sizes):
            self._captured[size] = self._pool.capture(self._capturable(size))
        logger.info("%d decode graphs captured in %.1f s", len(self._sizes), time.monotonic() - started)

    def _capturable(self, size: int) -> Compute:
        return lambda _: self._compute(size)

    def _compute(self, size: int) -> torch.Tensor:
        runner, inputs = self._runner, self._inputs
        records = self._records[: 4 * size].view(4, size)
        decode_inputs(records, self._tables, runner.draws, inputs, self._block_size)
        meta = AttentionMetadata(
            cu_seqlens_q=self._starts[: size + 1],
            context_lens=inputs.context_lens[:size],
            block_tables=inputs.block_tables[:size],
            slot_mapping=inputs.slot_mapping[:size],
            max_seqlen_q=1,
            num_prefill_tokens=0,
            num_prefills=0,
            num_decodes=size,
        )
        hidden = runner.model.forward(
            inputs.input_ids[:size], inputs.positions[:size], runner.kv_cache, meta, runner.backend
        )
        logits = runner.model.logits(hidden)
        greedy_tokens(logits, runner.draws[:size])
        return logits

    # ---- every step

    def takes(self, step: ScheduledStep) -> bool:
        return not step.prefills and len(step.decodes) <= self._sizes[-1] and bool(self._captured)

    def forget_last(self) -> None:
        self._last = ()

    def launch(self, decodes: Sequence[Request]) -> None:
        num_seqs = len(decodes)
        size = self._sizes[bisect_left(self._sizes, num_seqs)]
        records = self._records_of(tuple(decodes), size)
        indices, blocks = self._rows.news(decodes)
        if len(indices):
            on_device, at, new = self._staging.upload((records, indices, blocks))
            self._tables.view(-1).index_copy_(0, at, new)
        else:
            (on_device,) = self._staging.upload((records,))
        self._records[: 4 * size].copy_(on_device.view(-1))
        captured = self._captured[size]
        captured.replay()
        if any(request.sampling.temperature > 0 for request in decodes):
            tokens = self._runner.sampler.sample(captured.output[:num_seqs], decodes, records[1, :num_seqs])
            self._runner.draws[:num_seqs].copy_(tokens)

    @torch.inference_mode()
    def replay_last(self) -> None:
        # The input tokens differ, being the draws of the launch itself; the work does not.
        self._captured[self._last_records.shape[1]].replay()

    def _records_of(self, decodes: tuple[Request, ...], size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """See `decode_inputs`. A batch that goes on unchanged needs no look at its requests."""
        n = len(decodes)
        if decodes == self._last:
            records = self._last_records
            records[1, :n] += 1
            records[3, :n] = np.arange(n)
            return records
        records = np.zeros((4, size), dtype=np.int64)
        records[3] = -1
        records[0, :n] = self._rows.rows_of(decodes)
        records[1, :n] = [request.num_computed_tokens + 1 for request in decodes]
        records[3, :n] = [draw_row(request) for request in decodes]
        is_known = records[3, :n] < 0
        for row in np.flatnonzero(is_known):
            request = decodes[row]
            records[2, row] = request.token_ids[request.num_computed_tokens]
        self._last, self._last_records = decodes, records
        return records
