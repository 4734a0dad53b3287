"""Building an engine from a configuration and a checkpoint. Called once per worker, before the engine thread starts."""

from __future__ import annotations

from pathlib import Path

import torch

from baton.common.clock import Clock
from baton.common.config import DType, EngineConfig, TransferConfig
from baton.common.errors import ConfigError
from baton.engine.block_pool import BlockPool
from baton.engine.device_parts import make_device_parts
from baton.engine.kv_layout import DTYPES, KVLayout
from baton.engine.layer_groups import FixedGroups, LayerGroupPlan, LinkSpeed, TaperedGroups
from baton.engine.loop import Engine
from baton.engine.models.config import ModelConfig, load_model_config
from baton.engine.models.decoder import Decoder
from baton.engine.models.loader import fill_random, load_checkpoint, model_hash, random_hash
from baton.engine.pool_size import checked_num_blocks, connection_bytes, cpu_num_blocks, measured_num_blocks
from baton.engine.ports import Ports
from baton.engine.runner import Runner
from baton.engine.schedulers.chunked import ChunkedScheduler
from baton.engine.warm_up import plan_lengths, warm_up

# Before anything is measured: the link's speed, and the seconds that a token of a prompt takes.
_GUESSES = {"cuda": (LinkSpeed(100e9, 0.0002), 25e-6), "cpu": (LinkSpeed(0.5e9, 0.001), 1e-3)}


def build_engine(
    config: EngineConfig,
    transfer: TransferConfig,
    model_dir: Path,
    device: torch.device,
    ports: Ports,
    clock: Clock,
    *,
    random_weights: bool = False,
) -> Engine:
    """Load the model, size and allocate the KV cache; the caller starts the engine.

    `random_weights`, or `load_format` "random": config.json alone is read, for measurements. Raises ConfigError naming
    the setting to change.
    """
    random_weights = random_weights or config.load_format == "random"
    if device.type == "cpu":
        torch.set_num_threads(config.cpu_threads)
    model_config = load_model_config(model_dir)
    max_model_len = resolve_max_model_len(config, model_config)
    dtype = resolve_dtype(config.dtype, device)
    layout = KVLayout(
        model_hash=random_hash(model_config) if random_weights else model_hash(model_config, model_dir),
        dtype=dtype,
        block_size=config.block_size,
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
    )
    model = _load(model_config, max_model_len, DTYPES[dtype], device, None if random_weights else model_dir)
    runner = _runner(model, layout, config, max_model_len, device, connection_bytes(transfer))
    pool = BlockPool(runner.num_blocks, config.block_size, config.prefix_cache)
    scheduler = ChunkedScheduler(pool, config.max_num_seqs, config.max_num_batched_tokens)
    return Engine(
        runner,
        pool,
        scheduler,
        ports,
        clock,
        layer_groups=make_layer_groups(transfer, layout, device),
        max_model_len=max_model_len,
        overlap=resolve_overlap(config, device),
        launch_lead_s=config.launch_lead_s,
    )


def make_layer_groups(transfer: TransferConfig, layout: KVLayout, device: torch.device) -> LayerGroupPlan:
    """Adaptive groups begin with a guess of link and compute, and are told better."""
    if transfer.layer_groups:
        return FixedGroups(layout.num_layers, transfer.layer_groups)
    link, token_s = _GUESSES["cuda" if device.type == "cuda" else "cpu"]
    return TaperedGroups(layout, transfer.slot_bytes, link, token_s)


def resolve_dtype(dtype: DType, device: torch.device) -> str:
    """ "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def resolve_overlap(config: EngineConfig, device: torch.device) -> bool:
    """By default on a GPU: a CPU computes a step before its launch returns, so nothing would overlap."""
    return device.type == "cuda" if config.overlap is None else config.overlap


def resolve_max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    """The configured length, by default the model's. Raises ConfigError when it is longer than the model's."""
    wanted = config.max_model_len or model_config.max_positions
    if wanted > model_config.max_positions:
        raise ConfigError("engine.max_model_len", f"{wanted} is more than the model's {model_config.max_positions}")
    return wanted


def _load(
    config: ModelConfig, max_model_len: int, dtype: torch.dtype, device: torch.device, model_dir: Path | None
) -> Decoder:
    try:
        model = Decoder(config, max_model_len, dtype, device)
        if model_dir is None:
            fill_random(model)
        else:
            load_checkpoint(model, model_dir)
    except torch.OutOfMemoryError as error:
        raise ConfigError("model", f"the weights do not fit into the memory of {device}: {error}") from None
    return model


def _runner(
    model: Decoder,
    layout: KVLayout,
    config: EngineConfig,
    max_model_len: int,
    device: torch.device,
    reserved_bytes: int,
) -> Runner:
    parts = make_device_parts(device)

    def make_runner(kv_cache: torch.Tensor) -> Runner:
        runner = Runner(model, kv_cache, layout, parts.backend, parts.sampler, config.max_num_seqs)
        paths = parts.make_step_paths(runner, config, max_model_len)
        runner.decode_path, runner.prefill_path = paths.decode, paths.prefill
        return runner

    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif device.type == "cuda":
        num_blocks = measured_num_blocks(make_runner, layout, config, max_model_len, device, reserved_bytes)
    else:
        num_blocks = cpu_num_blocks(layout, config, max_model_len)
    checked_num_blocks(num_blocks, layout, max_model_len)
    try:
        kv_cache = layout.allocate(num_blocks, device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        size = num_blocks * layout.block_bytes / 2**20
        message = (
            f"a KV cache of {num_blocks} blocks ({size:.0f} MiB) does not fit into the memory of {device}: {error}"
        )
        raise ConfigError("engine.num_blocks", message) from None
    runner = make_runner(kv_cache)
    if device.type == "cuda":
        warm_up(runner, config.max_num_seqs, plan_lengths(config.max_num_batched_tokens, max_model_len))
    return runner
