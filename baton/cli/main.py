"""The `baton` command line: one typer app, one module per command."""

from __future__ import annotations

import sys

import typer

from baton.cli import chaos, demo, doctor, model, serve
from baton.common.errors import BatonError, ConfigError
from benchmarks.engine.command import bench_engine, bench_kernels
from benchmarks.serve.command import bench_serve
from benchmarks.served.command import bench_served
from benchmarks.transfer.command import bench_transfer

app = typer.Typer(
    name="baton",
    help="Serve large language models from prefill and decode workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("chaos")(chaos.chaos)
app.command("doctor")(doctor.doctor)
app.add_typer(model.app, name="model")
bench = typer.Typer(help="Measure servers, the engine and its kernels.", no_args_is_help=True)
bench.command("serve")(bench_serve)
bench.command("served")(bench_served)
bench.command("engine")(bench_engine)
bench.command("kernels")(bench_kernels)
bench.command("transfer")(bench_transfer)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point. Exit code 2 for a wrong setting, 1 for a cluster that cannot run; one line on stderr for each."""
    try:
        app()
    except ConfigError as error:
        print(f"baton: {error}", file=sys.stderr)
        sys.exit(2)
    except BatonError as error:
        print(f"baton: {error}", file=sys.stderr)
        sys.exit(1)
