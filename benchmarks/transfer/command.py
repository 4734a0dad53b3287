"""The command line of `baton bench transfer`: two GPUs of this machine, or CPU processes."""

from __future__ import annotations

import asyncio
import datetime
import importlib
import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from baton.common.config import EngineConfig, TransferConfig
from baton.common.errors import ConfigError
from benchmarks.engine.command import write_json
from benchmarks.engine.shapes import SHAPES
from benchmarks.gpu_timing import git_commit
from benchmarks.transfer.children import gpus
from benchmarks.transfer.figures import Row
from benchmarks.transfer.parts import PARTS, rows
from benchmarks.transfer.session import Options, Session

Flag = typer.Option
TOKENS = (512, 2048, 8192, 32768, 131008)  # the last leaves the model's length room for an answer
_TRANSFER, _ENGINE = TransferConfig(), EngineConfig()


def bench_transfer(
    out: Annotated[Path, Flag(help="JSON file for the results.")] = Path("benchmarks/results/transfer.json"),
    commit: Annotated[str | None, Flag(help="Commit to record where git is not at hand.")] = None,
    shape: Annotated[str, Flag(help=f"Model shape, random weights: {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    device: Annotated[str, Flag(help="cuda (two GPUs, NCCL), cpu (gloo) or auto.")] = "auto",
    backend: Annotated[str, Flag(help="nccl, gloo or auto; gloo also between two workers on one GPU.")] = "auto",
    dtype: Annotated[str, Flag(help="auto, bfloat16, float16 or float32.")] = "auto",
    tokens: Annotated[list[int] | None, Flag(help=f"Prompt lengths [{', '.join(map(str, TOKENS))}].")] = None,
    part: Annotated[list[str] | None, Flag(help=f"Some of {', '.join(PARTS)}; all by default.")] = None,
    repeats: Annotated[int, Flag(min=1, help="Hand-overs of each length; fewer of long ones.")] = 5,
    batch: Annotated[int, Flag(min=1, help="Sequences that decode beside.")] = 64,
    context: Annotated[int, Flag(min=1, help="Tokens of each of them at the start.")] = 2048,
    block_size: Annotated[int, Flag()] = _ENGINE.block_size,
    prefill_budget: Annotated[int, Flag(min=1, help="Tokens of one prefill step.")] = 8192,
    layer_groups: Annotated[int, Flag(min=0, help="0 adapts to compute and link.")] = _TRANSFER.layer_groups,
    window: Annotated[int, Flag(min=1, help="Slots of a pair.")] = _TRANSFER.window,
    slot_kib: Annotated[int, Flag(min=4, help="KiB of one slot, the largest message.")] = _TRANSFER.slot_bytes // 1024,
    max_ctas: Annotated[int, Flag(min=1, help="Multiprocessors that NCCL may take.")] = _TRANSFER.max_ctas,
    window_s: Annotated[float, Flag(help="Seconds of steps for each comparison.")] = 2.0,
    hops: Annotated[bool, Flag(help="Note every change of threads of every chunk in the JSON.")] = False,
    plot: Annotated[bool, Flag(help="Draw figures beside the JSON.")] = True,
) -> None:
    """KV hand-over between one prefill and one decode GPU: bandwidth, exposed time, what receiving costs decode."""
    parts = part or list(PARTS)
    if shape not in SHAPES or not set(parts) <= set(PARTS):
        raise ConfigError("shape" if shape not in SHAPES else "part", f"choose from {[*SHAPES]} and {[*PARTS]}")
    device = _device(device, backend)
    options = Options(
        shape=shape,
        device=device,
        backend=_backend(device, backend),
        dtype=dtype,
        tokens=tuple(sorted(tokens or TOKENS)),
        repeats=repeats,
        batch=batch,
        context=context,
        block_size=block_size,
        prefill_budget=prefill_budget,
        layer_groups=layer_groups,
        window=window,
        slot_bytes=slot_kib * 1024,
        max_ctas=max_ctas,
        window_s=window_s,
        hops=hops,
    )
    done = asyncio.run(_run(options, parts, out, commit))
    print_rows(done)
    if plot:
        _plot(done, out)


async def _run(options: Options, parts: list[str], out: Path, commit: str | None) -> list[Row]:
    done: list[Row] = []
    async with Session(options).running() as session:
        result: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit or git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "ray": importlib.metadata.version("ray"),
            "options": asdict(options),
            "workers": session.about,
        }
        async for row in rows(session, parts):
            done.append(row)
            print(line_of(row), flush=True)
            write_json(out, {**result, "rows": [one.as_json() for one in done]})
    return done


def _device(device: str, backend: str) -> str:
    """NCCL takes a GPU for each end."""
    needed = 1 if backend == "gloo" else 2
    if device == "auto":
        device = "cuda" if len(gpus()) >= needed else "cpu"
    if device == "cuda" and len(gpus()) < needed:
        raise ConfigError("device", f"this takes {needed} GPUs, and the machine has {len(gpus())}; see --backend")
    return device


def _backend(device: str, backend: str) -> str:
    if backend == "auto":
        return "nccl" if device == "cuda" else "gloo"
    if backend not in ("nccl", "gloo") or (backend == "nccl" and device == "cpu"):
        raise ConfigError("backend", f"{backend!r} does not go with device {device}")
    return backend


def line_of(row: Row) -> str:
    """A row as one line, with its short details."""
    value = "failed" if row.value is None else f"{row.value:.4g} {row.unit}"
    verdict = {True: "met", False: "NOT MET", None: ""}[row.is_met]
    details = ", ".join(f"{key} {_short(value)}" for key, value in row.details.items() if not isinstance(value, list))
    return " | ".join(text for text in (row.work, value, verdict, details) if text)


def print_rows(done: list[Row]) -> None:
    table = Table(title="KV hand-over")
    for column in ("work", "measured", "unit", "bound", "wanted", ""):
        table.add_column(column, justify="right" if column in ("measured", "bound", "wanted") else "left")
    for row in done:
        bound = row.at_most if row.at_most is not None else row.at_least
        verdict = {True: "met", False: "not met", None: ""}[row.is_met]
        table.add_row(row.work, _short(row.value), row.unit, _short(bound), _short(row.wanted), verdict)
    Console(width=120).print(table)


def _short(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(done: list[Row], out: Path) -> None:
    try:
        # Imported by name: matplotlib comes with the "bench" extra only.
        plots = importlib.import_module("benchmarks.transfer.plots")
    except ImportError as error:
        print(f"no figures: {error} (pip install 'baton-serve[bench]')")
        return
    for path in plots.write_plots([row.as_json() for row in done], out.with_suffix("")):
        print(f"wrote {path}")
