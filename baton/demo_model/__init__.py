"""The language model that comes with Baton: a small Llama checkpoint, described in README.md of this folder.

`baton demo` and tests ask for its directory with `demo_model_path`.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from baton.common.errors import ConfigError


def demo_model_path() -> Path:
    """The directory with config.json, model.safetensors and the tokenizer's files.

    Raises ConfigError when Baton was not installed as plain files (from a zip archive, for example) or without them.
    """
    folder = files(__name__)
    if not isinstance(folder, Path) or not (folder / "model.safetensors").is_file():
        raise ConfigError("model", f"the embedded model is not on disk at {folder}; give a model directory")
    return folder
