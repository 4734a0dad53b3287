"""The JSON files of a model directory. Used at start."""

from __future__ import annotations

import json
from pathlib import Path

from baton.common.errors import ConfigError


def read_json(file: Path) -> dict[str, object]:
    """The file's mapping; empty when there is no such file. Raises ConfigError naming it."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError("model", f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError("model", f"{file} must hold a mapping")
    return content
