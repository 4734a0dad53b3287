"""`baton serve MODEL`: a serving cluster until Ctrl-C."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from pathlib import Path
from typing import Annotated

import typer

from baton.cluster.serving import serving_cluster
from baton.common.config import BatonConfig, load_config

Flag = typer.Option


def serve(
    model: Annotated[str | None, typer.Argument(help="A model directory, or a model's id on the hub.")] = None,
    revision: Annotated[str | None, Flag(help="Commit, branch or tag of a model on the hub.")] = None,
    prefill: Annotated[int | None, Flag(help="Prefill workers; 0 is a colocated server.")] = None,
    decode: Annotated[int | None, Flag(help="Decode workers.")] = None,
    host: Annotated[str | None, Flag(help="Address that clients reach (default 127.0.0.1).")] = None,
    port: Annotated[int | None, Flag(help="HTTP port, 0 for any (default 8000).")] = None,
    grpc_port: Annotated[int | None, Flag(help="gRPC port, 0 for any (default 8001).")] = None,
    device: Annotated[str | None, Flag(help="auto, cuda or cpu (default auto).")] = None,
    dtype: Annotated[str | None, Flag(help="auto, bfloat16, float16 or float32 (default auto).")] = None,
    load_format: Annotated[
        str | None, Flag(help="safetensors, or random: weights are drawn, for measurements (default safetensors).")
    ] = None,
    max_model_len: Annotated[
        int | None, Flag(help="Longest prompt plus answer, in tokens (default the model's).")
    ] = None,
    block_size: Annotated[int | None, Flag(help="Tokens per KV block: 16, 32 or 64 (default 16).")] = None,
    ray_address: Annotated[str | None, Flag(help="Join this Ray cluster instead of starting one.")] = None,
    served_model_name: Annotated[str | None, Flag(help="Name in the API (default the directory's).")] = None,
    generation_config: Annotated[
        str | None, Flag(help="auto: the model's own sampling defaults; none: the API's (default auto).")
    ] = None,
    chat_template: Annotated[
        Path | None, Flag(help="File with a jinja template instead of the model's own chat templates.")
    ] = None,
    policy: Annotated[
        str | None, Flag(help="Where prompts are prefilled: local, remote or auto (default auto).")
    ] = None,
    config: Annotated[Path | None, Flag(help="YAML file; flags override its keys.")] = None,
) -> None:
    """Serve MODEL over HTTP and gRPC until Ctrl-C; a second Ctrl-C does not wait for running requests."""
    flags: dict[str, object] = {
        "model": model,
        "revision": revision,
        "served_model_name": served_model_name,
        "generation_config": generation_config,
        "chat_template": chat_template,
        "cluster.prefill": prefill,
        "cluster.decode": decode,
        "cluster.device": device,
        "cluster.ray_address": ray_address,
        "server.host": host,
        "server.port": port,
        "server.grpc_port": grpc_port,
        "engine.dtype": dtype,
        "engine.load_format": load_format,
        "engine.max_model_len": max_model_len,
        "engine.block_size": block_size,
        "router.policy": policy,
    }
    settings = load_config(config, {key: value for key, value in flags.items() if value is not None})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    asyncio.run(_serve(settings))


async def _serve(config: BatonConfig) -> None:
    shutdown = _Shutdown()
    try:
        async with serving_cluster(config, typer.echo) as cluster:
            shutdown.may_drain = True
            _keep_what_is_there()
            url = f"http://{config.server.host}:{cluster.router.http_port}"
            typer.echo(
                f"serving {cluster.config.model_name} on {url}/v1 (gRPC port {cluster.router.grpc_port}); Ctrl-C stops"
            )
            await shutdown.requested.wait()
            typer.echo("draining; press Ctrl-C again to stop at once")
    except asyncio.CancelledError:
        typer.echo("stopped at once")
    else:
        typer.echo("stopped")


def _keep_what_is_there() -> None:
    """Modules and servers live to the end: garbage collections need not walk them, which takes 50 ms and more."""
    gc.collect()
    gc.freeze()


class _Shutdown:
    """SIGINT and SIGTERM: the first asks for a drain, or ends a start that is under way; the next ends the drain."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.may_drain = False
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.requested.is_set() or not self.may_drain:
            self._task.cancel()
        self.requested.set()
