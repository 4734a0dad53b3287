"""Where models come from: a directory wins, a hub id is fetched at its revision, everything else is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from baton.common.config import BatonConfig
from baton.common.errors import ConfigError
from baton.engine.models import source
from baton.engine.models.source import pinned, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Stands in for `snapshot_download`: one snapshot, and a record of what was asked."""

    def __init__(self, root: Path) -> None:
        self.snapshot = root / "snapshots" / COMMIT
        self.snapshot.mkdir(parents=True)
        (self.snapshot / "config.json").write_text("{}")
        self.calls: list[tuple[str, object]] = []
        self.patterns: dict[str, list[str]] = {}
        self.error: Exception | None = None

    def __call__(self, repo_id: str, *, revision: str | None, **patterns: list[str]) -> str:
        self.calls.append((repo_id, revision))
        self.patterns = patterns
        if self.error is not None:
            raise self.error
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", fake)
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_directory_wins_over_a_hub_id(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_model("org/model") == Path("org/model")
    assert not hub.calls
    with pytest.raises(ConfigError) as error:
        resolve_model("org/model", "v1")
    assert error.value.key == "revision"


@pytest.mark.parametrize("revision", [None, "v1.0", COMMIT])
def test_a_hub_id_is_fetched_at_its_revision(hub: FakeHub, revision: str | None) -> None:
    assert resolve_model("org/Model-1.5_b", revision) == hub.snapshot
    assert hub.calls == [("org/Model-1.5_b", revision)]
    fetched = hub.patterns["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in fetched)
    assert "consolidated*" in hub.patterns["ignore_patterns"]


@pytest.mark.parametrize("model", ["/no/such/dir", "./missing", "a/b/c", "../up", "org/", "", "has space/x", "~/none"])
def test_what_is_neither_is_refused_without_asking_the_hub(hub: FakeHub, model: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_model(model) if model else resolve_model("?")
    assert error.value.key == "model"
    assert not hub.calls


@pytest.mark.parametrize(
    "fault", [LocalEntryNotFoundError("no connection\nmore"), OfflineModeIsEnabled("offline mode")]
)
def test_without_a_connection_the_error_says_what_to_do(hub: FakeHub, fault: Exception) -> None:
    hub.error = fault
    with pytest.raises(ConfigError, match="give the path of its directory") as error:
        resolve_model("org/model", "v2")
    assert "org/model at revision v2" in str(error.value)
    assert str(fault).splitlines()[0] in str(error.value)


def test_a_repository_that_is_no_model_is_refused(hub: FakeHub) -> None:
    (hub.snapshot / "config.json").unlink()
    with pytest.raises(ConfigError, match=f"at {COMMIT} holds no config.json"):
        resolve_model("org/model")


def test_pinning_names_the_commit_and_keeps_the_name(hub: FakeHub) -> None:
    config = pinned(BatonConfig(model="org/model", revision="main"), resolve_model("org/model", "main"))
    assert (config.model, config.revision, config.model_name) == ("org/model", COMMIT, "org/model")
    named = BatonConfig(model="org/model", served_model_name="mine")
    assert pinned(named, hub.snapshot).model_name == "mine"
    local = BatonConfig(model=str(hub.snapshot))
    assert pinned(local, hub.snapshot) is local
