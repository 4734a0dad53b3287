"""What a worker says of itself: the heartbeat to routers and the health answer to its supervisor. Asyncio thread."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from baton.engine.ports import BlockCounts, EngineStats
from baton.worker.half import Half
from baton.worker.step_timing import StepTime
from kv_transfer.timeline import Histogram, TransferTotals
from protos import worker_pb2 as pb

logger = logging.getLogger(__name__)
STALLED_AFTER_S = 30.0
MAX_FAILED_STEPS = 3


def heartbeat(sequence: int, stats: EngineStats, timing: StepTime, halves: Sequence[Half]) -> pb.WorkerHeartbeat:
    totals = [of_half for half in halves if (of_half := half.transfer_totals()) is not None]
    return pb.WorkerHeartbeat(
        sequence=sequence,
        blocks=_blocks(stats.blocks, sum(half.staging_in_use() for half in halves)),
        timing=pb.StepTiming(
            base_s=timing.base_s,
            per_prefill_token_s=timing.per_prefill_token_s,
            per_decode_seq_s=timing.per_decode_seq_s,
            samples=timing.samples,
        ),
        num_waiting=stats.num_waiting,
        num_running=stats.num_running,
        queued_prefill_tokens=stats.queued_prefill_tokens,
        steps=stats.steps,
        idle_or_progress_age_s=stats.progress_age,
        transfers=_transfers(totals[0]) if totals else None,
    )


def health(stats: EngineStats, num_faults: int) -> tuple[bool, str]:
    """(healthy, reason). Healthy means idle, or a step ended lately; a defect of the worker itself is never healthy."""
    if num_faults:
        return False, f"{num_faults} defects were caught; see the log"
    if not conserved(stats.blocks):
        return False, f"blocks are lost or counted twice: {stats.blocks}"
    if stats.failed_steps_in_a_row >= MAX_FAILED_STEPS:
        return False, f"the last {stats.failed_steps_in_a_row} steps failed"
    if stats.progress_age > STALLED_AFTER_S:
        return False, f"the engine has work and made no step for {stats.progress_age:.1f} s"
    return True, "idle" if stats.progress_age == 0.0 else "working"


def conserved(blocks: BlockCounts) -> bool:
    """Invariant I4: every block is in exactly one list."""
    counted = blocks.free + blocks.cached + blocks.running + blocks.leased + blocks.quarantined
    return counted == blocks.total


def _blocks(blocks: BlockCounts, staging_in_use: int) -> pb.BlockCounts:
    if not conserved(blocks):
        logger.error("blocks are lost or counted twice: %s", blocks)
    return pb.BlockCounts(
        free=blocks.free,
        cached=blocks.cached,
        running=blocks.running,
        leased=blocks.leased,
        quarantined=blocks.quarantined,
        total=blocks.total,
        staging_in_use=staging_in_use,
    )


def _transfers(totals: TransferTotals) -> pb.TransferTotals:
    return pb.TransferTotals(
        num_bytes=totals.num_bytes,
        num_chunks=totals.num_chunks,
        num_hand_overs=totals.num_hand_overs,
        receive_posted=_histogram(totals.receive_posted),
        exposed=_histogram(totals.exposed),
    )


def _histogram(histogram: Histogram) -> pb.SecondsHistogram:
    return pb.SecondsHistogram(bounds=histogram.bounds, counts=histogram.counts, total=histogram.total)
