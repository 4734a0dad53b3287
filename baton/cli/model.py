"""`baton model …`: small helpers around model directories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from baton.engine.models.tiny import write_tiny_llama
from benchmarks.engine.servable import write_servable
from benchmarks.engine.shapes import SHAPES

app = typer.Typer(help="Make and inspect model directories.", no_args_is_help=True)


@app.command("tiny")
def tiny(directory: Annotated[Path, typer.Argument(help="Where to write it.")], seed: int = 0) -> None:
    """Write a tiny random Llama checkpoint with a byte-level tokenizer: real files, meaningless text."""
    typer.echo(f"wrote {write_tiny_llama(directory, seed=seed)}")


@app.command("shape")
def shape(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")],
    directory: Annotated[Path, typer.Argument(help="Where to write it.")],
) -> None:
    """Write config.json and a tokenizer of a model's shape, without weights, for `serve --load-format random`."""
    typer.echo(f"wrote {write_servable(name, directory)}")
