"""`baton chaos PLAN.yaml`: load, faults and a verdict."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from baton.chaos.plan import ChaosPlan, checked_plan, load_plan
from baton.chaos.report import as_dict, print_report
from baton.chaos.run import run_plan
from benchmarks.serve.environment import describe_client

Flag = typer.Option


def chaos(
    plan: Annotated[Path, typer.Argument(help="A plan, for instance benchmarks/chaos/quick.yaml.")],
    attach: Annotated[str | None, Flag(help="URL of a server that runs on this machine.")] = None,
    model: Annotated[Path | None, Flag(help="Model directory [a tiny random model].")] = None,
    duration: Annotated[float | None, Flag(help="Seconds of load instead of the plan's requests and duration.")] = None,
    seed: Annotated[int | None, Flag(help="Seed of load and faults.")] = None,
    out: Annotated[Path | None, Flag(help="Write the result as JSON.")] = None,
    verbose: Annotated[bool, Flag(help="Log what router and supervisor notice.")] = False,
) -> None:
    """Disturb a cluster under load. Exit code 1 when a request is lost, a token wrong, or anything left over."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    console = Console()
    result = run_plan(_overridden(load_plan(plan), attach, model, duration, seed), console.print)
    print_report(console, result)
    if out is not None:
        origin = {"plan": plan.name, "client": asyncio.run(describe_client())}
        out.write_text(json.dumps(origin | as_dict(result), indent=2) + "\n", encoding="utf-8")
    if not result.is_good:
        raise typer.Exit(1)


def _overridden(
    plan: ChaosPlan, attach: str | None, model: Path | None, duration: float | None, seed: int | None
) -> ChaosPlan:
    changes: dict[str, object] = {"attach": attach, "model": model, "seed": seed}
    if duration is not None:
        changes["load"] = plan.load.model_copy(update={"duration_s": duration, "requests": 0})
    values = plan.model_copy(update={key: value for key, value in changes.items() if value is not None})
    return checked_plan(values.model_dump())
