"""The command lines of `baton bench engine` and `baton bench kernels`: read flags, measure, write a table and JSON."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from baton.common.config import EngineConfig
from baton.common.errors import ConfigError
from baton.engine.kv_layout import DTYPES
from baton.engine.models.config import load_model_config
from benchmarks.engine.drive import DrivenEngine
from benchmarks.engine.floors import Ceilings, Floors
from benchmarks.engine.session import PARTS, Row, Session
from benchmarks.engine.shapes import SHAPES, write_shape
from benchmarks.engine.tuning_rows import few_rows
from benchmarks.gpu_timing import environment, measure_ceilings, require_gpu

Flag = typer.Option
Out = Annotated[Path, Flag(help="JSON file for the results.")]
Commit = Annotated[str | None, Flag(help="Commit to record where git is not at hand.")]


def bench_engine(
    out: Out = Path("benchmarks/results/engine.json"),
    commit: Commit = None,
    shape: Annotated[str, Flag(help=f"Model shape, random weights: {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    part: Annotated[list[str] | None, Flag(help=f"Some of {', '.join(PARTS)}; all by default.")] = None,
    max_num_seqs: Annotated[int, Flag(min=1)] = 256,
    max_num_batched_tokens: Annotated[int, Flag(min=1)] = 8192,
    max_model_len: Annotated[int, Flag(min=1)] = 33024,
    gpu_memory_utilization: Annotated[float, Flag()] = 0.9,
    block_size: Annotated[int, Flag()] = 16,
    overlap: Annotated[bool, Flag(help="Launch a step before the one before is read back.")] = True,
    decode_graphs: Annotated[bool, Flag(help="Run decode steps as CUDA graphs.")] = True,
    prefill_graph_tokens: Annotated[int, Flag(min=0, help="Run steps with prompts up to this size as graphs.")] = 1024,
    few: Annotated[list[str] | None, Flag(help="A row for the tuning table of products of a few rows.")] = None,
) -> None:
    """Step times and throughput of the engine alone, beside their floors, on one GPU."""
    parts = part or list(PARTS)
    if shape not in SHAPES or not set(parts) <= set(PARTS):
        raise ConfigError("shape" if shape not in SHAPES else "part", f"choose from {[*SHAPES]} and {[*PARTS]}")
    device = require_gpu("baton bench engine")
    ceilings = measure_ceilings(device)
    torch.cuda.empty_cache()
    config = EngineConfig.model_validate(
        {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "block_size": block_size,
            "prefix_cache": False,
            "overlap": overlap,
            "decode_graphs": decode_graphs,
            "prefill_graph_tokens": prefill_graph_tokens,
        }
    )
    with tempfile.TemporaryDirectory() as directory, few_rows(few or [], device):
        model_dir = write_shape(shape, Path(directory))
        engine = DrivenEngine(config, model_dir, device)
        model_config = load_model_config(model_dir)
    measured = Ceilings(ceilings["read_gb_s"] * 1e9, ceilings["matmul_tflop_s"] * 1e12)
    floors = Floors(model_config, DTYPES[engine.engine.layout.dtype].itemsize, measured)
    rows = [Row("engine start", engine.start_seconds, "s", details={"kv_tokens": engine.max_tokens})]
    result: dict[str, Any] = {
        **environment(device, commit),
        "shape": shape,
        "config": config.model_dump(),
        "few": few or [],
        "ceilings": ceilings,
    }
    for row in Session(engine, floors, engine.max_tokens).rows(parts):
        rows.append(row)
        print(line_of(row), flush=True)
        write_json(out, {**result, "rows": [row.as_json() for row in rows]})
    print_rows(rows, ceilings)


def bench_kernels(out: Out = Path("benchmarks/results/kernels.json"), commit: Commit = None) -> None:
    """Each kernel's rate beside its ceiling and beside torch's attention on the same tensors, on one GPU."""
    # Imported by name: it needs Triton, which a CPU build of torch comes without.
    importlib.import_module("benchmarks.kernels").measure_kernels(out, commit)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def line_of(row: Row) -> str:
    cells = [row.work, _number(row.value), row.unit, _share(row.ratio)]
    gap = row.details.get("host_gap")
    if isinstance(gap, float):
        cells.append(f"host gap {gap:.1%}")
    return " ".join([*cells, *(f"{key}: {row.details[key]}" for key in ("failed", "left out") if key in row.details)])


def print_rows(rows: list[Row], ceilings: dict[str, float]) -> None:
    table = Table(title=", ".join(f"{name} {value:.0f}" for name, value in ceilings.items()))
    for column in ("work", "measured", "unit", "floor", "floor / measured", "vLLM 0.26"):
        table.add_column(column, justify="left" if column in ("work", "unit") else "right")
    for row in rows:
        table.add_row(row.work, _number(row.value), row.unit, _number(row.floor), _share(row.ratio), _number(row.peer))
    Console(width=110).print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
