"""The ways of a GPU for steps that need not be launched kernel by kernel. Imported by name, on a GPU only."""

from __future__ import annotations

from baton.common.config import EngineConfig
from baton.engine.cuda.decode_graphs import DecodeGraphs
from baton.engine.cuda.graph_pool import GraphPool
from baton.engine.cuda.prefill_graphs import PrefillGraphs
from baton.engine.device_parts import StepPaths
from baton.engine.kernels.greedy import greedy_tokens
from baton.engine.padded_steps import PaddedSteps
from baton.engine.runner import Runner


def make_step_paths(runner: Runner, config: EngineConfig, max_model_len: int) -> StepPaths:
    """What the configuration does not switch off. All share one pool of memory."""
    pool = GraphPool(runner.model.device)
    max_blocks = -(-max_model_len // config.block_size)
    decode = DecodeGraphs(runner, pool, config.max_num_seqs, max_blocks) if config.decode_graphs else None
    max_tokens = min(config.prefill_graph_tokens, config.max_num_batched_tokens)
    if not max_tokens:
        return StepPaths(decode, None)
    steps = PaddedSteps(runner, greedy_tokens, max_tokens, config.max_num_seqs, max_blocks)
    return StepPaths(decode, PrefillGraphs(steps, pool, runner.layout.num_layers))
