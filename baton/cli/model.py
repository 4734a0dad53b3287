"""`baton model …`: small helpers around model directories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from baton.engine.models.tiny import write_tiny_llama

app = typer.Typer(help="Make and inspect model directories.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Keeps `tiny` a subcommand while it is the only one."""


@app.command("tiny")
def tiny(directory: Annotated[Path, typer.Argument(help="Where to write it.")], seed: int = 0) -> None:
    """Write a tiny random Llama checkpoint with a byte-level tokenizer: real files, meaningless text."""
    typer.echo(f"wrote {write_tiny_llama(directory, seed=seed)}")
