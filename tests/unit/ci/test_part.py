"""`.ci/part`: exit codes, and that an interrupt ends what it started."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

PART = Path(__file__).parents[3] / ".ci" / "part"
WAIT_S = 10.0


def part(folder: Path, budget: int, script: str) -> subprocess.Popen[str]:
    """Runs a shell's script as the part "x" of the checks, in a session of its own as under a terminal."""
    (folder / ".venv").mkdir()
    command = [str(PART), "x", str(budget), "sh", "-c", script]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("code", [0, 1, 5])
def test_the_exit_code_is_the_commands(tmp_path: Path, code: int) -> None:
    with part(tmp_path, 9, f"exit {code}") as process:
        assert process.wait(WAIT_S) == code
    assert (tmp_path / ".venv" / ".parts").read_text().startswith("x ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_command_which_cleans_up_first(tmp_path: Path, number: signal.Signals) -> None:
    script = "trap 'kill $!; echo cleaned up; exit 7' INT; sleep 60 & echo begun; wait"
    with part(tmp_path, 60, script) as process:
        assert process.stdout is not None
        assert "begun" in [process.stdout.readline().strip() for _ in range(2)]
        process.send_signal(number)
        assert process.stdout.readline() == "cleaned up\n"
        assert process.wait(WAIT_S) == 7
