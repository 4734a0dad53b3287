"""`.ci/part`: exit codes, and that an interrupt ends what it started."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

PART = Path(__file__).parents[3] / ".ci" / "part"
WAIT_S = 30.0


MODES: tuple[list[str], ...] = ([], ["--behind"])


def part(folder: Path, mode: list[str], budget: int, script: str) -> subprocess.Popen[str]:
    """Runs a shell's script as the part "x" of the checks, in a session of its own as under a terminal."""
    (folder / ".venv").mkdir()
    # A shell that was started with signals ignored, as whatever runs in the background is, cannot catch them any more.
    command = ["env", "--default-signal", str(PART), *mode, "x", str(budget), "sh", "-c", script]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("code", [0, 5])
def test_the_exit_code_is_the_commands(tmp_path: Path, code: int, mode: list[str]) -> None:
    with part(tmp_path, mode, 9, f"exit {code}") as process:
        assert process.wait(WAIT_S) == code
    assert (tmp_path / ".venv" / ".parts").read_text().startswith("x ")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_command_which_cleans_up_first(
    tmp_path: Path, number: signal.Signals, mode: list[str]
) -> None:
    script = "trap 'kill $!; echo cleaned up; exit 7' INT; sleep 60 & echo begun; wait"
    with part(tmp_path, mode, 60, script) as process:
        assert process.stdout is not None
        assert "begun" in [process.stdout.readline().strip() for _ in range(2)]
        process.send_signal(number)
        assert process.stdout.readline() == "cleaned up\n"
        assert process.wait(WAIT_S) == 7


def test_a_part_behind_the_others_is_nicer_than_all_of_them(tmp_path: Path) -> None:
    with part(tmp_path, ["--behind"], 9, "nice; cat /proc/self/autogroup 2>/dev/null || :") as process:
        output, _ = process.communicate(timeout=WAIT_S)
    _, niceness, *autogroup = output.split("\n")
    assert int(niceness) > os.nice(0)
    assert autogroup[0] == "" or autogroup[0].endswith(" nice 10")
