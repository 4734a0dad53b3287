"""The command line of `baton bench serve`: reads flags, runs the session, writes tables, JSON and plots."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.util
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from baton.common.clock import MonotonicClock
from baton.common.errors import ConfigError
from benchmarks.serve import options
from benchmarks.serve.client import ApiSettings
from benchmarks.serve.compare import print_comparison
from benchmarks.serve.connection import parse_server
from benchmarks.serve.environment import describe_client, describe_server, served_models
from benchmarks.serve.metrics import Slo
from benchmarks.serve.options import milliseconds
from benchmarks.serve.records import Counting
from benchmarks.serve.report import print_result, to_json
from benchmarks.serve.session import BenchResult, BenchSettings, Session, choose_counting
from benchmarks.serve.tokens import TokenSource
from benchmarks.serve.workload import PRESETS, Workload, plan_workload

Flag = typer.Option
_RESULTS = Path("benchmarks/results/serve")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._]+")


def bench_serve(
    url: Annotated[str, typer.Argument(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, Flag(help="Model name (the first that the server lists).")] = None,
    workload: Annotated[str | None, Flag(help=f"Preset lengths: {', '.join(PRESETS)}.")] = None,
    input_len: Annotated[str | None, Flag(help="Prompt tokens: N, LOW:HIGH or exp:MEAN:CAP.")] = None,
    output_len: Annotated[str | None, Flag(help="Answer tokens, in the same form.")] = None,
    trace: Annotated[Path | None, Flag(help="JSONL of timestamp (ms), input_length, output_length, hash_ids.")] = None,
    time_scale: Annotated[float, Flag(help="Trace times are multiplied by this; 0.5 doubles the load.")] = 1.0,
    num_requests: Annotated[
        int | None,
        Flag("--num-requests", "--limit", "-n", min=1, help="Requests a run (the preset's or the trace's)."),
    ] = None,
    max_total_tokens: Annotated[int | None, Flag(help="Leave out requests whose prompt plus answer is longer.")] = None,
    rate: Annotated[float | None, Flag(help="Open loop, Poisson, requests/s; inf sends all at once.")] = None,
    concurrency: Annotated[int | None, Flag(min=1, help="Closed loop with this many requests under way.")] = None,
    seed: Annotated[int | None, Flag(min=0, help="Of lengths, tokens and arrivals (the preset's, or 0).")] = None,
    vocab_size: Annotated[int, Flag(min=1, help="Prompt token ids lie below this.")] = 32000,
    token_ids: Annotated[str | None, Flag(help="LOW:HIGH, HIGH excluded; keeps off special tokens (10:VOCAB).")] = None,
    temperature: Annotated[float, Flag(min=0.0)] = 0.0,
    ignore_eos: Annotated[bool, Flag(help="Ask for answers of exactly the wanted length.")] = True,
    count_tokens: Annotated[
        str, Flag(help="Per chunk by: usage, token_ids, chunks, or auto (asks the server).")
    ] = "auto",
    extra_body: Annotated[str | None, Flag(help="JSON object merged into every request.")] = None,
    api_key: Annotated[str | None, Flag(envvar="OPENAI_API_KEY", show_envvar=True, help="Never written down.")] = None,
    timeout: Annotated[float, Flag(help="Seconds until a request counts as failed.")] = 600.0,
    warmup: Annotated[int, Flag(min=0, help="Requests before the first run, in no result.")] = 8,
    repeat: Annotated[int, Flag(min=1, help="Runs; tables show medians.")] = 1,
    slo_ttft: Annotated[float | None, Flag(help="TTFT bound of each request, ms.")] = None,
    slo_tpot: Annotated[float | None, Flag(help="TPOT bound of each request, ms.")] = None,
    slo_share: Annotated[float, Flag(min=0.0, max=1.0, help="Share of requests that must meet both.")] = 0.9,
    search_goodput: Annotated[str | None, Flag(help="LOW:HIGH req/s: find the highest rate within the SLOs.")] = None,
    max_lag: Annotated[float, Flag(help="Runs whose client was later than this at p99 are invalid, ms.")] = 50.0,
    label: Annotated[str | None, Flag(help="Name of the result; say here what serves, on what hardware.")] = None,
    records: Annotated[bool, Flag("--records", help="Write every request into the JSON.")] = False,
    plot: Annotated[bool, Flag("--plot", help="Write CDFs and a timeline; needs matplotlib.")] = False,
    results: Annotated[Path, Flag(help="Folder for JSON and plots.")] = _RESULTS,
    compare: Annotated[tuple[Path, Path] | None, Flag(help="Print the ratios of two saved results, and stop.")] = None,
) -> None:
    """Measure any OpenAI-compatible server under load: TTFT, TPOT, ITL, throughput, goodput.

    Exit code 1 when the result is invalid (the client could not keep up) or no request succeeded.
    """
    console = Console()
    if compare is not None:
        print_comparison(console, *compare)
        return
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot", "needs matplotlib: pip install 'baton-serve[bench]'")
    counting = options.counting_of(count_tokens)
    planned = plan_workload(
        options.workload_settings(
            name=workload,
            input_len=input_len,
            output_len=output_len,
            trace=trace,
            time_scale=time_scale,
            count=num_requests,
            max_total_tokens=max_total_tokens,
            seed=seed,
            token_ids=options.token_range(token_ids, vocab_size),
        )
    )
    settings = BenchSettings(
        server=parse_server(url),
        api=ApiSettings(
            model or "", temperature, ignore_eos, counting or Counting.CHUNKS, timeout, options.extra_body(extra_body)
        ),
        rate=rate,
        concurrency=concurrency,
        warmup=warmup,
        repeat=repeat,
        slo=Slo(milliseconds(slo_ttft, "--slo-ttft"), milliseconds(slo_tpot, "--slo-tpot"), slo_share),
        search=options.search_settings(search_goodput),
        max_lag=max_lag / 1000.0,
        label=label,
    )
    options.check_load(settings, has_trace=trace is not None)
    result, document = asyncio.run(_measure(console, settings, planned, counting is None, api_key, records))
    print_result(console, result)
    stem = _write(results, document)
    console.print(f"wrote {stem}.json", highlight=False, soft_wrap=True)
    if plot:
        _plot(console, result, stem)
    if result.invalid or not any(record.ok for measured in result.runs for record in measured.run.records):
        raise typer.Exit(1)


async def _measure(
    console: Console, settings: BenchSettings, workload: Workload, choose: bool, api_key: str | None, records: bool
) -> tuple[BenchResult, dict[str, Any]]:
    """Look at the server, run the session, and put the document together."""
    clock = MonotonicClock()
    client = await describe_client()
    server = await describe_server(settings.server, api_key)
    api = settings.api
    if not api.model:
        api = dataclasses.replace(api, model=_first_model(server))
    tried: dict[str, str] = {}
    if choose:
        source = TokenSource(0, workload.settings.token_low, workload.settings.token_high)
        counting, tried = await choose_counting(settings.server, api, source, clock, api_key)
        api = dataclasses.replace(api, counting=counting)
    settings = dataclasses.replace(settings, api=api)
    console.print(f"{settings.server.url}, model {api.model}, tokens counted by {api.counting}", highlight=False)
    say = functools.partial(console.print, highlight=False, markup=False)
    result = await Session(settings, workload, clock, api_key, say).execute()
    environment = {"client": client, "server": server}
    return result, to_json(result, environment, {"asked": api.counting, "tried": tried}, records)


def _first_model(server: dict[str, Any]) -> str:
    models = served_models(server)
    if not models:
        raise ConfigError("--model", f"{server['url']} lists no model: name one")
    return models[0]


def _write(folder: Path, document: dict[str, Any]) -> Path:
    """Write the JSON under a name that says when and what; returns its path without the suffix."""
    date = document["environment"]["client"]["date_utc"].removesuffix("+00:00").replace(":", "")
    what = document["label"] or document["settings"]["api"]["model"]
    name = "-".join([date, _NOT_IN_NAMES.sub("_", what)[:60], _NOT_IN_NAMES.sub("_", document["workload"]["name"])])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return folder / name


def _plot(console: Console, result: BenchResult, stem: Path) -> None:
    """matplotlib is an extra and takes a second to import, so only this reaches for it."""
    plots = import_module("benchmarks.serve.plots")
    for path in plots.write_plots([measured.run for measured in result.runs], stem, stem.name):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
