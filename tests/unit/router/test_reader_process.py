"""The reader processes: what they import, and what becomes of requests when one is lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from baton.common.errors import Unavailable
from router.reader.pool import LostWhileIdle, RequestReader, _Process

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
