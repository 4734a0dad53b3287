"""Running every shape of step once before the first request, so that none waits for a kernel to be compiled.

Kernels are compiled per power of two of the decode batch. Called by the builder on a GPU; writes nothing to the cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from baton.engine.batch import Batch
from baton.engine.runner import Runner

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 16
PLAN_STEP = 1024
SMALLEST_BLOCK = 16


def warm_up(runner: Runner, max_num_seqs: int, prompt_lengths: Iterable[int] = ()) -> None:
    """Run prefills, also of `prompt_lengths` tokens, and decodes of 1, 2, 4, … up to `max_num_seqs` sequences."""
    started = time.monotonic()
    for num_decodes in decode_sizes(max_num_seqs):
        runner.profile(harmless_batch(num_decodes, num_prefills=0))
    runner.profile(harmless_batch(1, num_prefills=1))
    for length in prompt_lengths:
        runner.profile(harmless_batch(0, num_prefills=1, prompt_tokens=length))
    if runner.prefill_path is not None:
        runner.prefill_path.prepare()
    if runner.decode_path is not None:
        runner.decode_path.prepare()
    logger.info("kernels ready after %.1f s", time.monotonic() - started)


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two below `max_num_seqs`, and `max_num_seqs`."""
    return [*(1 << exponent for exponent in range((max_num_seqs - 1).bit_length())), max_num_seqs]


def plan_lengths(max_num_batched_tokens: int, max_model_len: int) -> range:
    """Prompt lengths for which a library builds a plan at their first use."""
    return range(PLAN_STEP, min(max_num_batched_tokens, max_model_len) + 1, PLAN_STEP)


def harmless_batch(num_decodes: int, num_prefills: int, prompt_tokens: int = PROMPT_TOKENS) -> Batch:
    """Sequences at their first positions whose tokens are not stored and whose context is whatever block 0 holds."""
    lens = np.array([1] * num_decodes + [prompt_tokens] * num_prefills, dtype=np.int32)
    num_tokens = int(lens.sum())
    return Batch(
        input_ids=np.zeros(num_tokens, dtype=np.int64),
        positions=np.concatenate([np.arange(n, dtype=np.int64) for n in lens]),
        slot_mapping=np.full(num_tokens, -1, dtype=np.int64),
        cu_seqlens_q=np.concatenate(([0], np.cumsum(lens))).astype(np.int32),
        context_lens=lens,
        block_tables=np.zeros((len(lens), -(-int(lens.max()) // SMALLEST_BLOCK)), dtype=np.int32),
        sample_rows=np.arange(num_decodes, dtype=np.int64),
        draw_positions=np.ones(num_decodes, dtype=np.int64),
        draw_rows=np.full(num_decodes, -1, dtype=np.int64),
        max_seqlen_q=prompt_tokens if num_prefills else 1,
        num_decodes=num_decodes,
        num_prefills=num_prefills,
        num_prefill_tokens=num_tokens - num_decodes,
        fresh_rows=tuple(pairwise(range(num_decodes, num_tokens + 1, prompt_tokens))) if num_prefills else (),
    )
