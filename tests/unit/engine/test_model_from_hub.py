"""The real hub client against a hub on loopback: what is fetched, at which commit, and what happens without a hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.fake_hub import FakeHub, serve_hub
from tests.support.tiny_model import make_tiny_llama

TINY = "org/tiny"
MAIN, TAGGED = "a" * 40, "b" * 40
RESOLVE = """
import sys
from baton.common.errors import ConfigError
from baton.engine.models.source import resolve_model
for name in sys.argv[1:]:
    try:
        model, _, revision = name.partition("@")
        path = resolve_model(model, revision or None)
        print(path.name, *sorted(file.name for file in path.iterdir() if file.stat().st_size > 1))
    except ConfigError as error:
        print("refused", error)
"""


def resolve(cache: Path, endpoint: str, *names: str) -> tuple[list[str], str]:
    """A line per model or model@revision, and what went to stderr.

    In a process of its own: the client reads its settings at import.
    """
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", RESOLVE, *names]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout.splitlines(), done.stderr


def test_a_snapshot_is_fetched_once_and_kept(tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in make_tiny_llama(tmp_path / "files").iterdir()}
    wanted = sorted(files)
    files |= {
        "pytorch_model.bin": b"x",
        "model.py": b"x",
        "consolidated.safetensors": b"x",
        "original/params.json": b"x",
    }
    hub = FakeHub("org/tiny", files, {"main": MAIN, MAIN: MAIN, "v1": TAGGED, TAGGED: TAGGED})
    with serve_hub(hub):
        names = [TINY, f"{TINY}@v1", f"{TINY}@{TAGGED}"]
        lines, progress = resolve(tmp_path / "cache", hub.endpoint, *names, f"{TINY}@v2", "org/other")
        assert lines[:3] == [" ".join((commit, *wanted)) for commit in (MAIN, TAGGED, TAGGED)]
        assert lines[3].startswith("refused model: org/tiny at revision v2")
        assert "RevisionNotFound" in lines[3]
        assert "100%" in progress
        assert sorted(hub.fetched) == wanted
        assert "RepositoryNotFoundError" in lines[4]
        endpoint = hub.endpoint
    kept, _ = resolve(tmp_path / "cache", endpoint, *names)
    assert kept == lines[:3]
    [line], _ = resolve(tmp_path / "empty", endpoint, TINY)
    assert line.startswith("refused model: org/tiny is not a local directory")
    assert line.endswith("fetch it elsewhere and give the path of its directory")
