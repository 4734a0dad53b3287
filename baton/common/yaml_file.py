"""A YAML file that a user has named, as plain values."""

from __future__ import annotations

from pathlib import Path

import yaml

from baton.common.errors import ConfigError


def read_yaml(file: Path, key: str) -> object:
    """The file's content, None where it is empty. Raises ConfigError about `key` naming the file."""
    try:
        content: object = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(key, f"cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(key, f"{file} is not valid YAML: {str(error).splitlines()[0]}") from None
    return content
