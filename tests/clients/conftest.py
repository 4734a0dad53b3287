"""One `baton serve` of the demo model for all clients, and the environment in which the heavier ones are installed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from baton.demo_model import demo_model_path
from tests.support.serving import ServeProcess, serve

MODEL = "demo"
HERE = Path(__file__).parent
END_S = 30.0
CLIENTS_PYTHON = HERE.parents[1] / ".venv-clients" / "bin" / "python"


@pytest.fixture(scope="session")
def server() -> Iterator[ServeProcess]:
    """Prompts of some length are handed over, so both paths are used. In the end it is killed, and nothing is left."""
    arguments = ("--prefill", "1", "--decode", "1", "--device", "cpu", "--served-model-name", MODEL)
    with serve(demo_model_path(), *arguments) as started:
        yield started
        kill(started)


def kill(server: ServeProcess) -> None:
    """Router and driver of the Ray cluster in one process: workers, controller and Ray itself end with it."""
    running = server.processes()
    titles = [" ".join(process.cmdline()) for process in running]
    assert any("DecodeWorker" in title for title in titles), titles
    server.process.kill()
    psutil.wait_procs(running, END_S)
    left = server.processes()
    assert not left, [process.cmdline() for process in left]


@dataclass(frozen=True, slots=True)
class ClientEnvironment:
    """Runs programs where `make clients` has installed the clients whose requirements differ from the server's."""

    python: Path
    home: Path
    url: str

    def run(self, *arguments: str, timeout: float = 150.0) -> str:
        """Standard output of a Python program or module; what it says otherwise is shown when it fails."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "OPENAI_"))},
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LANGSMITH_TRACING": "false",
            "OPENAI_API_KEY": "unused",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [str(self.python), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def program(self, name: str) -> dict[str, Any]:
        """What a program of programs/ prints as its last line."""
        output = self.run(str(HERE / "programs" / f"{name}.py"), f"{self.url}/v1", MODEL)
        content = json.loads(output.strip().splitlines()[-1])
        assert isinstance(content, dict)
        return content


@pytest.fixture(scope="session")
def clients(server: ServeProcess, tmp_path_factory: pytest.TempPathFactory) -> ClientEnvironment:
    if not CLIENTS_PYTHON.exists():
        pytest.skip("the clients are not installed: `make clients` does it")
    return ClientEnvironment(CLIENTS_PYTHON, tmp_path_factory.mktemp("home"), server.url)
