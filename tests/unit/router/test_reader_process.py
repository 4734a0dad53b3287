"""The reader processes: what they import, and what becomes of requests when one is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from baton.common.errors import InvalidRequest, Unavailable
from router.chat_templates import ChatTemplates
from router.reader import pool
from router.reader.pool import LostWhileIdle, ReaderLimits, RequestReader, _Process

LARGE = json.dumps({"prompt": "a" * 40_000}).encode()


async def test_what_lies_in_the_working_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    reader = RequestReader()
    assert (await reader.to_tokenize(LARGE)).prompt == "a" * 40_000
    await reader.close()


async def test_a_process_that_died_idle_costs_no_request() -> None:
    """Its end has not been seen yet when the next request comes."""
    reader = RequestReader(num_processes=1)
    await reader.to_tokenize(LARGE)
    (process,) = reader._processes
    assert process._process is not None
    lost = process._process
    lost.send_signal(signal.SIGKILL)
    assert (await reader.to_tokenize(LARGE)).prompt == "a" * 40_000
    assert process._process is not lost
    await reader.close()


async def test_what_ends_a_fresh_process_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = RequestReader(num_processes=1)
    starts = 0

    async def start_and_die(process: _Process) -> None:
        nonlocal starts
        starts += 1
        await original(process)
        process.kill()

    original = _Process.start
    monkeypatch.setattr(_Process, "start", start_and_die)
    with pytest.raises(Unavailable, match="was lost") as error:
        await reader.to_tokenize(LARGE)
    assert starts == 1
    assert not isinstance(error.value, LostWhileIdle)
    await reader.close()


async def test_a_process_that_ends_by_its_limit_is_not_killed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill that meets its end could take the exit code, which says why, from who waits for it."""
    kills: list[_Process] = []
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    reader = RequestReader(ChatTemplates({"default": loop}, {}), ReaderLimits(cpu_s=0.3), num_processes=1)
    with monkeypatch.context() as patch:
        patch.setattr(_Process, "kill", kills.append)
        with pytest.raises(InvalidRequest, match=r"took over 0\.3 s"):
            await reader.chat(b'{"messages": [{"role": "user", "content": "x"}]}')
    assert not kills
    await reader.close()


async def test_a_process_that_closes_its_pipes_and_lives_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_ENDING_S", 0.1)
    lingering = "import os, signal; os.close(0); os.close(1); signal.pause()"
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", lingering, stdin=pipe, stdout=pipe)
    process = _Process(ChatTemplates({}, {}), ReaderLimits())
    process._process = child
    with pytest.raises(LostWhileIdle, match=f"exit code {-signal.SIGKILL}"):
        await process.exchange(LARGE)
    assert process._process is None
