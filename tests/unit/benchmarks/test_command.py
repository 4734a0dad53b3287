"""`baton bench serve` as a whole, against a scripted server in another thread."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from baton.common.errors import ConfigError, Unavailable
from benchmarks.serve.command import bench_serve
from benchmarks.serve.compare import differences, ratios
from tests.unit.benchmarks.scripted_server import Exchange, Script, ScriptedServer, running, well_behaved

Start = Callable[[Script], ScriptedServer]
LENGTHS = ("--input-len", "4:8", "--output-len", "3", "--num-requests", "6", "--warmup", "2", "--max-lag", "60000")


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers, each on an event loop in a thread of its own; all are stopped at the end."""
    threads: list[_ServerThread] = []

    def start_one(script: Script) -> ScriptedServer:
        threads.append(_ServerThread(script))
        return threads[-1].server()

    yield start_one
    for thread in threads:
        thread.stop()


class _ServerThread(threading.Thread):
    """One scripted server and its event loop."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script
        self._ready = threading.Event()
        self.start()

    def run(self) -> None:
        asyncio.run(self._serve())

    def server(self) -> ScriptedServer:
        assert self._ready.wait(20)
        return self._server

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop_asked.set)
        self.join(20)
        assert not self.is_alive()

    async def _serve(self) -> None:
        self._loop, self._stop_asked = asyncio.get_running_loop(), asyncio.Event()
        async with running(self._script) as self._server:
            self._ready.set()
            await self._stop_asked.wait()


def bench(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(bench_serve)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def only_result(folder: Path) -> Any:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_a_closed_loop_from_start_to_file(start: Start, tmp_path: Path) -> None:
    server = start(well_behaved)
    arguments = ("--concurrency", 2, "--repeat", 3, "--slo-ttft", 60000, "--records", "--label", "one GPU/x")
    done = bench(server.url, *LENGTHS, *arguments, "--results", tmp_path)
    assert done.exit_code == 0, done.output
    assert "medians of 3 runs" in done.output
    assert "one token a chunk is assumed" in done.output
    result = only_result(tmp_path)
    assert len(result["runs"]) == 3
    assert result["summary"]["requests"]["median"] == 6
    assert result["summary"]["output_tokens"] == {"median": 18, "min": 18, "max": 18}
    assert result["summary"]["in_slo_share"]["median"] == 1.0
    assert result["environment"]["server"]["version"] == {"version": "1.2.3"}
    assert result["environment"]["client"]["python"]
    assert result["settings"]["api"]["model"] == "scripted"
    assert result["workload"]["input_lengths"] == {"kind": "uniform", "low": 4, "high": 8}
    assert all(len(record["chunk_times"]) == 3 for record in result["runs"][0]["records"])
    assert result["valid"] is True
    assert len(server.bodies) == 3 + 2 + 3 * 6  # Probes of counting, warm-up, runs.
    prompts = [tuple(body["prompt"]) for body in server.bodies[3:]]
    assert len(set(prompts)) == len(prompts)


def test_an_open_loop_of_a_trace(start: Start, tmp_path: Path) -> None:
    server = start(well_behaved)
    trace = tmp_path / "small.jsonl"
    rows = [{"timestamp": 40 * i, "input_length": 600, "output_length": 2, "hash_ids": [0, i]} for i in range(4)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    done = bench(server.url, "--trace", trace, "--time-scale", 0.5, "--results", tmp_path / "out", "--max-lag", 60000)
    assert done.exit_code == 0, done.output
    result = only_result(tmp_path / "out")
    assert result["summary"]["offered_rps"]["median"] == pytest.approx(3 / 0.06)
    assert result["workload"]["trace"] == "small.jsonl"
    sent = [body["prompt"] for body in server.bodies[-4:]]
    assert all(prompt[:512] == sent[0][:512] for prompt in sent)
    assert len({tuple(prompt[512:]) for prompt in sent}) == 4


def test_the_server_offers_token_ids_or_usage_or_refuses(start: Start, tmp_path: Path) -> None:
    async def picky(exchange: Exchange) -> None:
        if "continuous_usage_stats" in exchange.body["stream_options"]:
            exchange.head("400 Bad Request", "Content-Length: 10\r\n")
            exchange.writer.write(b"no such id")
            return
        exchange.head()
        ids = list(range(exchange.body["max_tokens"]))
        exchange.event({"id": "a", "choices": [{"text": "x", "finish_reason": "length", "token_ids": ids}]})
        exchange.end()

    done = bench(start(picky).url, *LENGTHS, "--concurrency", 1, "--results", tmp_path)
    assert done.exit_code == 0, done.output
    result = only_result(tmp_path)
    assert result["counting"]["asked"] == "token_ids"
    assert "no such id" in result["counting"]["tried"]["usage"]
    assert result["counting"]["used"] == ["token_ids"]
    assert result["summary"]["tokens_per_chunk"]["median"] == 3


def test_a_server_whose_counts_do_not_add_up(start: Start, tmp_path: Path) -> None:
    async def stuck(exchange: Exchange) -> None:
        count = exchange.body["max_tokens"]
        exchange.head()
        for _ in range(count):
            exchange.token(usage=exchange.usage(1))
        exchange.event({"choices": [], "usage": exchange.usage(count)})
        exchange.end()

    server = start(stuck)
    asked = bench(server.url, *LENGTHS, "--concurrency", 1, "--count-tokens", "usage", "--results", tmp_path / "asked")
    assert asked.exit_code == 1
    assert "adds up to 6 tokens, its usage says 18" in asked.output
    chosen = bench(server.url, *LENGTHS, "--concurrency", 1, "--results", tmp_path / "auto")
    assert chosen.exit_code == 0, chosen.output
    counting = only_result(tmp_path / "auto")["counting"]
    assert counting["used"] == ["chunks"]
    assert counting["tried"]["usage"].startswith("wrong: 1 tokens by chunk, 4")


def test_failures_are_printed_and_saved(start: Start, tmp_path: Path) -> None:
    async def every_second(exchange: Exchange) -> None:
        if exchange.body["max_tokens"] == 3 and len(exchange.body["prompt"]) == 5:
            exchange.writer.close()
            return
        await well_behaved(exchange)

    lengths = ("--output-len", 3, "-n", 8, "--input-len", "5:6", "--warmup", 0)
    done = bench(start(every_second).url, *lengths, "--rate", "inf", "--results", tmp_path, "--max-lag", 60000)
    assert done.exit_code == 0, done.output
    result = only_result(tmp_path)
    count = result["summary"]["failed"]["median"]
    assert 0 < count < 8
    assert f"FAILED {count:.0f} of 8 requests: disconnected" in done.output
    assert result["runs"][0]["failures"] == {"disconnected": count}
    assert result["runs"][0]["failure_samples"][0]["failure"] == "disconnected"


def test_a_client_that_cannot_keep_up_spoils_the_run(start: Start, tmp_path: Path) -> None:
    done = bench(start(well_behaved).url, *LENGTHS, "--rate", 1000, "--results", tmp_path, "--max-lag", 1e-6)
    assert done.exit_code == 1
    assert "INVALID run 1" in done.output
    assert only_result(tmp_path)["valid"] is False


def test_the_goodput_search_reports_its_bracket(start: Start, tmp_path: Path) -> None:
    done = bench(
        start(well_behaved).url, *LENGTHS, "--search-goodput", "200:400", "--slo-ttft", 60000, "--results", tmp_path
    )
    assert done.exit_code == 0, done.output
    assert "the highest rate tried passes" in done.output
    assert only_result(tmp_path)["search"]["passed"] == 400


def test_plots_are_written(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = bench(start(well_behaved).url, *LENGTHS, "--concurrency", 2, "--results", tmp_path, "--plot")
    assert done.exit_code == 0, done.output
    assert {path.name.rsplit("-", 1)[1] for path in tmp_path.glob("*.png")} == {"cdf.png", "timeline.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_plots_without_matplotlib_are_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    done = bench("http://127.0.0.1:1", *LENGTHS, "--concurrency", 1, "--plot")
    assert isinstance(done.exception, ConfigError)
    assert "pip install" in str(done.exception)


def test_nobody_answers() -> None:
    done = bench("http://127.0.0.1:1", *LENGTHS, "--concurrency", 1)
    assert isinstance(done.exception, Unavailable)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--rate"),
        (("--rate", 1, "--concurrency", 1), "excludes"),
        (("--rate", 0), "positive"),
        (("--search-goodput", "1:2"), "--slo-ttft"),
        (("--search-goodput", "2:1", "--slo-ttft", 1), "LOW"),
        (("--rate", 1, "--extra-body", "[]"), "object"),
        (("--rate", 1, "--count-tokens", "abacus"), "abacus"),
        (("--rate", 1, "--slo-ttft", -5), "positive"),
    ],
)
def test_wrong_flags_are_named(arguments: tuple[object, ...], message: str) -> None:
    done = bench("http://127.0.0.1:1", *LENGTHS, *arguments)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)


def saved(path: Path, ttft: float, rate: float = 4.0) -> Path:
    spread = {"median": ttft, "min": ttft, "max": ttft}
    summary = {"ttft_ms_p50": spread, "tpot_ms_p50": None, "failed": {"median": 0, "min": 0, "max": 0}}
    document: dict[str, Any] = {
        "format": "baton.bench.serve/1",
        "label": None,
        "valid": True,
        "invalid": [],
        "summary": summary,
    }
    path.write_text(json.dumps(document | {"settings": {"rate": rate}, "workload": {"name": "fixed"}}))
    return path


def test_comparison_prints_ratios_and_warns_of_unlike_runs(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "a.json", 100.0), saved(tmp_path / "b.json", 80.0, rate=5.0)
    done = bench("--compare", one, two)
    assert done.exit_code == 0, done.output
    assert "0.800" in done.output
    assert "settings.rate differs: 4.0 / 5.0" in done.output
    first, second = json.loads(one.read_text()), json.loads(two.read_text())
    assert ratios(first, second) == {"ttft_ms_p50": (100.0, 80.0, pytest.approx(0.8)), "failed": (0.0, 0.0, None)}
    assert differences(first, first) == []


def test_comparison_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"format": math.pi}))
    for name in ("x.json", "missing.json"):
        done = bench("--compare", tmp_path / name, tmp_path / name)
        assert isinstance(done.exception, ConfigError)
