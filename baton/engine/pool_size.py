"""How many KV blocks a worker gets when the configuration does not say."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from baton.common.config import EngineConfig, TransferConfig
from baton.common.errors import ConfigError
from baton.engine.batch import Batch
from baton.engine.kv_layout import KVLayout
from baton.engine.runner import Runner

logger = logging.getLogger(__name__)

MakeRunner = Callable[[torch.Tensor], Runner]

# Measured with NCCL 2.28 and its buffers as `kv_transfer.connection` sets them, at the receiving end, which takes more:
# what the first communicator of a process takes beside its channels, and what a channel takes.
FIRST_COMMUNICATOR_BYTES = 350 * 2**20
COMMUNICATOR_BYTES_PER_CTA = 17 * 2**20
CPU_CACHE_BYTES = 256 * 2**20
CPU_TOKENS_PER_SEQ = 256


def cpu_num_blocks(layout: KVLayout, config: EngineConfig, max_model_len: int) -> int:
    """Room for four longest sequences, or 256 tokens for each of `max_num_seqs`; at most 256 MiB."""
    tokens = max(4 * max_model_len, config.max_num_seqs * CPU_TOKENS_PER_SEQ)
    return min(layout.num_blocks_for(tokens), max(1, CPU_CACHE_BYTES // layout.block_bytes))


def checked_num_blocks(num_blocks: int, layout: KVLayout, max_model_len: int) -> None:
    """Raise ConfigError unless the longest allowed sequence fits."""
    needed = layout.num_blocks_for(max_model_len)
    if num_blocks < needed:
        size = needed * layout.block_bytes / 2**20
        raise ConfigError(
            "engine.max_model_len",
            f"a sequence of {max_model_len} tokens needs {needed} KV blocks ({size:.1f} MiB) and there are "
            f"{num_blocks}: lower engine.max_model_len to {num_blocks * layout.block_size}, or raise engine.num_blocks "
            "(on a GPU: engine.gpu_memory_utilization)",
        )


def connection_bytes(transfer: TransferConfig) -> int:
    """What the KV connections for which memory is set aside take on a GPU: staging and communicators."""
    if not transfer.num_pairs:
        return 0
    communicator = transfer.max_ctas * COMMUNICATOR_BYTES_PER_CTA
    staging = transfer.window * transfer.slot_bytes
    return FIRST_COMMUNICATOR_BYTES + transfer.num_pairs * (communicator + staging)


def measured_num_blocks(
    make_runner: MakeRunner,
    layout: KVLayout,
    config: EngineConfig,
    max_model_len: int,
    device: torch.device,
    reserved_bytes: int,
) -> int:
    """What the GPU has left for the cache beside weights, graphs, the largest step and what must stay free.

    `reserved_bytes` stay free for what is allocated later by others.

    Runs the largest step once: `max_num_batched_tokens` of prefill and a sampled row for each of `max_num_seqs`.
    """
    try:
        step_bytes, graph_bytes = _measure(make_runner, layout, config, max_model_len, device)
    except torch.OutOfMemoryError as error:
        message = f"the largest step does not fit into the memory of {device}: lower it: {error}"
        raise ConfigError("engine.max_num_batched_tokens", message) from None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    taken = step_bytes + graph_bytes + reserved_bytes
    room = int(total * config.gpu_memory_utilization) - (total - free) - taken
    used = "GPU memory: %d of %d bytes free, the largest step takes %d, graphs take %d, connections %d"
    logger.info(used, free, total, step_bytes, graph_bytes, reserved_bytes)
    if room < layout.block_bytes:
        message = f"{config.gpu_memory_utilization} of the memory of {device} leaves nothing for the KV cache: raise it"
        raise ConfigError("engine.gpu_memory_utilization", message)
    return room // layout.block_bytes


def _measure(
    make_runner: MakeRunner, layout: KVLayout, config: EngineConfig, max_model_len: int, device: torch.device
) -> tuple[int, int]:
    """Bytes of the largest step and the runner's buffers, and of all graphs, on a cache that is just large enough."""
    batch = _profiling_batch(config, max_model_len)
    kv_cache = layout.allocate(batch.block_tables.shape[1], device)
    before = torch.cuda.memory_allocated(device)
    runner = make_runner(kv_cache)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner.profile(batch)
    torch.cuda.synchronize(device)
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    paths = (runner.prefill_path, runner.decode_path)
    runner.prefill_path = runner.decode_path = None
    return step_bytes, sum(path.measure() for path in paths if path is not None)


def _profiling_batch(config: EngineConfig, max_model_len: int) -> Batch:
    """Prompts of up to `max_model_len` that fill the token budget. They share blocks: what they compute is not read."""
    budget, size = config.max_num_batched_tokens, config.block_size
    lens = [max_model_len] * (budget // max_model_len) + [budget % max_model_len] * (budget % max_model_len > 0)
    positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lens])
    blocks = np.arange(-(-max(lens) // size), dtype=np.int32)
    return Batch(
        input_ids=np.zeros(budget, dtype=np.int64),
        positions=positions,
        slot_mapping=positions,
        cu_seqlens_q=np.concatenate(([0], np.cumsum(lens))).astype(np.int32),
        context_lens=np.array(lens, dtype=np.int32),
        block_tables=np.tile(blocks, (len(lens), 1)),
        sample_rows=np.zeros(min(config.max_num_seqs, budget), dtype=np.int64),
        draw_positions=np.ones(min(config.max_num_seqs, budget), dtype=np.int64),
        draw_rows=np.zeros(0, dtype=np.int64),
        max_seqlen_q=max(lens),
        num_decodes=0,
        num_prefills=len(lens),
        num_prefill_tokens=budget,
    )
