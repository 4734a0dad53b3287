"""What a plan may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.chaos.plan import checked_plan, load_plan
from baton.cli.main import main
from baton.common.errors import ConfigError

URL = "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"attach": URL}, "needs the directory of the served model"),
        ({"attach": URL, "model": "m", "faults": [{"kind": "kill_gcs"}]}, "takes no kill_gcs"),
        ({"attach": URL, "model": "m", "faults": [{"kind": "inject", "settings": {}}]}, "takes no inject"),
        ({"faults": [{"kind": "earthquake"}]}, "earthquake"),
        ({"load": {"prompt_tokens": [5, 1]}}, "1 <= low <= high"),
        ({"load": {"cancelled": 2}}, "less than or equal to 1"),
        ([], "ChaosPlan"),
    ],
)
def test_a_wrong_plan_is_a_clear_error(content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_plan(content)


def test_faults_from_outside_are_for_attached_clusters_too() -> None:
    faults = [{"kind": "kill"}, {"kind": "pause"}, {"kind": "aborts"}]
    assert len(checked_plan({"attach": URL, "model": "m", "faults": faults}).faults) == 3


def test_a_file_that_is_no_plan_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("faults: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_plan(tmp_path / "plan.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_plan(tmp_path / "none.yaml")


def test_the_flags_of_the_command_are_checked_with_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan.yaml").write_text("faults: [{kind: kill_gcs}]")
    arguments = ["chaos", str(tmp_path / "plan.yaml"), "--attach", URL, "--model", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["baton", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert "takes no kill_gcs" in capsys.readouterr().err
