"""A cluster under test: `baton serve` as a subprocess, its log with the seconds since its start, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from baton.common.clock import Clock
from baton.common.config import BatonConfig
from baton.common.errors import Unavailable

_STOP_S = 40.0
_STAGES = {
    "router listens": re.compile(r"^router on "),
    "Ray is up": re.compile(r"^(colocated|disaggregated): "),
    "kernels ready": re.compile(r"kernels ready after"),
    "worker listens": re.compile(r"worker \S+ listens on"),
    "serving": re.compile(r"^serving "),
}
_ADDRESS = re.compile(r"^serving .* on (http://\S+)/v1 ")


@dataclass
class RunningServer:
    """`stages`: seconds from the start of the process to each stage, one entry per worker where it is the worker's."""

    url: str = ""
    stages: dict[str, list[float]] = field(default_factory=dict)
    last_lines: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def running_server(
    config: BatonConfig, folder: Path, name: str, clock: Clock, timeout_s: float
) -> AsyncIterator[RunningServer]:
    """Start it and wait until it serves. On leaving it is interrupted, and killed when that does not end it.

    Writes `<name>.yaml` and `<name>.log` into `folder`. Raises Unavailable with the end of the log.
    """
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton", "serve", "--config", str(file)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    server = RunningServer()
    serving = asyncio.Event()
    reader = asyncio.create_task(_follow(process, server, serving, folder / f"{name}.log", clock))
    try:
        await asyncio.wait_for(serving.wait(), timeout_s)
        if not server.url:
            raise Unavailable(_ended("baton serve ended", server))
        yield server
    except TimeoutError:
        raise Unavailable(_ended(f"no server after {timeout_s:g} s", server)) from None
    finally:
        await _stop(process)
        await reader


def _ended(what: str, server: RunningServer) -> str:
    """One line that says why, then the end of the log."""
    lines = [line.strip() for line in server.last_lines if line.strip()]
    return "\n".join([f"{what}: {lines[-1] if lines else 'it said nothing'}", *lines[-30:]])


async def _follow(
    process: asyncio.subprocess.Process, server: RunningServer, serving: asyncio.Event, log: Path, clock: Clock
) -> None:
    started = clock.now()
    assert process.stdout is not None
    with log.open("w", encoding="utf-8") as out:
        async for raw in process.stdout:
            line, seconds = raw.decode("utf-8", "replace"), clock.now() - started
            out.write(f"{seconds:8.2f} {line}")
            server.last_lines = [*server.last_lines[-99:], line]
            for stage, pattern in _STAGES.items():
                if pattern.search(line):
                    server.stages.setdefault(stage, []).append(round(seconds, 2))
            if match := _ADDRESS.match(line):
                server.url = match.group(1)
                serving.set()
    serving.set()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
    try:
        await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
