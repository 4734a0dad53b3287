"""Runs `baton serve` as a subprocess and looks at what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_MARKER = "BATON_TEST_RUN"
_SERVING = re.compile(r"serving \S+ on http://")  # anywhere in a line: Ray prints in pieces


@dataclass(slots=True)
class ServeProcess:
    """A running `baton serve`. `lines` grows as it prints."""

    process: subprocess.Popen[str]
    run_id: str
    http_port: int
    grpc_port: int
    lines: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def processes(self) -> list[psutil.Process]:
        """Every live process that descends from this run, wherever it was reparented."""
        return [process for process in psutil.process_iter() if _belongs_to(process, self.run_id)]

    def listening(self) -> set[tuple[str, int]]:
        """(address, port) of every socket on which a process of this run listens."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        found.add((connection.laddr.ip, connection.laddr.port))
        return found

    def interrupt(self, timeout: float = 60.0) -> int:
        """Ctrl-C; returns the exit code. Raises subprocess.TimeoutExpired."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout)

    def terminate(self) -> None:
        """SIGTERM, as an orchestrator sends it. Does not wait."""
        self.process.send_signal(signal.SIGTERM)

    def text(self) -> str:
        return "".join(self.lines)


@contextlib.contextmanager
def serve(model: Path, *arguments: str, timeout: float = 180.0) -> Iterator[ServeProcess]:
    """Start `baton serve` on free ports and wait until it says that it serves; kill what is left at the end."""
    run_id = uuid.uuid4().hex
    command = [sys.executable, "-m", "baton", "serve", str(model), "--port", "0", "--grpc-port", "0", *arguments]
    process = subprocess.Popen(
        command,
        env={**os.environ, _MARKER: run_id, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    serving = threading.Event()
    reader = threading.Thread(target=_read, args=(process, lines, serving), name="serve-output")
    reader.start()
    try:
        if not serving.wait(timeout) or process.poll() is not None:
            raise AssertionError(f"baton serve did not come up within {timeout} s:\n{''.join(lines)}")
        match = re.search(r"on http://[^:]+:(\d+)/v1 \(gRPC port (\d+)\)", "".join(lines))
        assert match is not None, "".join(lines)
        yield ServeProcess(process, run_id, int(match.group(1)), int(match.group(2)), lines)
    finally:
        for leftover in psutil.process_iter():
            if _belongs_to(leftover, run_id):
                with contextlib.suppress(psutil.NoSuchProcess):
                    leftover.kill()
        process.wait(30)
        reader.join(30)


def _read(process: subprocess.Popen[str], lines: list[str], serving: threading.Event) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if _SERVING.search(line):
            serving.set()
    serving.set()


def _belongs_to(process: psutil.Process, run_id: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARKER) == run_id
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
