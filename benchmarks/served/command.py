"""The command line of `baton bench served`: clusters started one after the other, measured, written down."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import re
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from baton.common.clock import Clock, MonotonicClock
from baton.common.errors import BatonError, ConfigError
from benchmarks.engine.servable import write_servable
from benchmarks.serve.environment import describe_client
from benchmarks.served.measure import measure
from benchmarks.served.plan import Layout, ServedPlan, read_plan
from benchmarks.served.server import RunningServer, running_server
from benchmarks.served.table import clients_table, markdown

Flag = typer.Option
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._]+")
_MIN_REQUESTS = 2


def bench_served(
    plan: Annotated[Path, typer.Argument(help="YAML: model shape, layouts, loads (benchmarks/served/plans).")],
    out: Annotated[Path, Flag(help="Folder for JSON, tables, logs and plots.")] = Path("benchmarks/results/served"),
    layout: Annotated[list[str] | None, Flag(help="Only these layouts.")] = None,
    load: Annotated[list[str] | None, Flag(help="Only these loads.")] = None,
    scale: Annotated[float, Flag(min=0.01, help="Number of requests of each load, times this.")] = 1.0,
    budget: Annotated[float, Flag(help="Seconds after which no further load or cluster is begun.")] = 3600.0,
    start_timeout: Annotated[float, Flag(help="Seconds that a cluster may take until it serves.")] = 300.0,
    raw: Annotated[bool, Flag(help="Write every request and its timeline beside the result.")] = True,
    commit: Annotated[str | None, Flag(help="Commit to record where git is not at hand.")] = None,
    render: Annotated[bool, Flag("--render", help="Only tables and plots of the results in --out.")] = False,
) -> None:
    """Start a cluster in each layout of PLAN, put its loads on it, and write what clients saw and where time went."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "served.json"
    if not render:
        what = read_plan(plan)
        runner = _Runner(what, out, file, scale, budget, start_timeout, raw, commit, console)
        asyncio.run(runner.run(set(layout or ()), set(load or ())))
    document = json.loads(file.read_text(encoding="utf-8"))
    table = markdown(document)
    (out / "served.md").write_text(table, encoding="utf-8")
    console.print(table)
    if importlib.util.find_spec("matplotlib") is not None:
        # matplotlib is an extra, so only this reaches for it.
        import_module("benchmarks.served.plots").write_plots(document, out)
    if not document["rows"]:
        raise typer.Exit(1)


class _Runner:
    """Runs the plan once and writes the result anew after every load, so that an interrupted run keeps what it has."""

    def __init__(
        self,
        plan: ServedPlan,
        out: Path,
        file: Path,
        scale: float,
        budget_s: float,
        start_timeout_s: float,
        raw: bool,
        commit: str | None,
        console: Console,
    ) -> None:
        self._plan = plan
        self._out = out
        self._file = file
        self._scale = scale
        self._start_timeout_s = start_timeout_s
        self._raw = raw
        self._commit = commit
        self._say = functools.partial(console.print)
        self._clock: Clock = MonotonicClock()
        self._end = self._clock.now() + budget_s
        self._document: dict[str, Any] = {"format": "baton.bench.served/1", "rows": [], "starts": {}, "not_run": []}

    async def run(self, layouts: set[str], loads: set[str]) -> None:
        client = await describe_client()
        self._document |= {"plan": self._plan.model_dump(), "environment": client}
        if self._commit is not None:
            client["git_commit"] = self._commit
        self._write()
        with tempfile.TemporaryDirectory() as directory:
            model = self._model(Path(directory) / (self._plan.shape or "model"))
            for layout in self._plan.layouts:
                wanted = not layouts or layout.name in layouts
                if wanted and any(not loads or load.name in loads for load in layout.loads):
                    await self._layout(layout, model, loads)

    def _model(self, directory: Path) -> Path:
        return write_servable(self._plan.shape, directory) if self._plan.shape else Path(self._plan.model or "")

    async def _layout(self, layout: Layout, model: Path, loads: set[str]) -> None:
        if self._is_late(layout.name):
            return
        config = self._plan.config_of(layout, model)
        name = _NOT_IN_NAMES.sub("-", layout.name)
        self._say(f"== {layout.name}")
        try:
            async with running_server(config, self._out, name, self._clock, self._start_timeout_s) as server:
                self._document["starts"][layout.name] = server.stages
                self._say(f"serving after {server.stages.get('serving')} s: {server.stages}")
                await self._loads(layout, server, config.model_name, _vocab_size(model), loads)
        except BatonError as error:
            self._skip(layout.name, str(error))

    async def _loads(
        self, layout: Layout, server: RunningServer, model: str, vocab_size: int, wanted: set[str]
    ) -> None:
        for load in layout.loads:
            name = f"{layout.name}, {load.name}"
            if (wanted and load.name not in wanted) or self._is_late(name):
                continue
            requests = max(round(load.requests * self._scale), min(load.requests, _MIN_REQUESTS))
            try:
                measured = await measure(server.url, model, vocab_size, load, requests, self._clock, self._say)
            except BatonError as error:
                self._skip(name, str(error))
                continue
            self._document["rows"].append({"layout": layout.name, **measured.row})
            self._write()
            self._say("\n".join(clients_table(self._document["rows"][-1:])))
            if self._raw:
                stem = _NOT_IN_NAMES.sub("-", name)
                (self._out / f"raw-{stem}.json").write_text(json.dumps(measured.raw), encoding="utf-8")

    def _is_late(self, name: str) -> bool:
        if self._clock.now() < self._end:
            return False
        self._skip(name, "the budget was spent")
        return True

    def _skip(self, name: str, reason: str) -> None:
        self._say(f"NOT RUN {name}: {reason}")
        self._document["not_run"].append({"what": name, "reason": reason})
        self._write()

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")


def _vocab_size(model: Path) -> int:
    """Raises ConfigError when the model's config.json does not say."""
    try:
        return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("model", f"{model}/config.json has no vocab_size: {error!r}") from None
