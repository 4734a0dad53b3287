"""One YAML file and flags over it: what wins, and how a wrong key is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.common.config import load_config
from baton.common.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    file = folder / "baton.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_flags_win_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\nengine: {block_size: 32, dtype: float32}\nserver: {port: 1}\n")
    config = load_config(file, {"engine.block_size": 64, "cluster.prefill": 0, "served_model_name": "other"})
    assert (config.engine.block_size, config.engine.dtype, config.server.port) == (64, "float32", 1)
    assert (config.cluster.prefill, config.cluster.decode) == (0, None)
    assert (config.model, config.model_name) == ("m", "other")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, ""), {"model": "a/b"}) == load_config(None, {"model": "a/b"})


@pytest.mark.parametrize(
    ("text", "overrides", "key"),
    [
        ("", {}, "model"),
        ("model: m\nengine: {block_sizes: 32}", {}, "engine.block_sizes"),
        ("model: m\nengine: {block_size: 17}", {}, "engine.block_size"),
        ("model: m", {"router.policy": "sometimes"}, "router.policy"),
        ("model: m", {"transfer.window": 0}, "transfer.window"),
        ("model: m\nengine: 3", {"engine.block_size": 16}, "engine"),
        ("[1, 2]", {}, "config"),
        ("model: [", {}, "config"),
        ("model: \x00", {}, "config"),
    ],
)
def test_the_first_wrong_key_is_named(tmp_path: Path, text: str, overrides: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(written(tmp_path, text), overrides)
    assert error.value.key == key


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config: cannot read .*none\.yaml"):
        load_config(tmp_path / "none.yaml", {})
