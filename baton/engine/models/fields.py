"""Reading one key of a config.json: its type and range are checked, null is as good as absent.

Raises ConfigError naming the key, under `prefix` when the key lies inside another object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from baton.common.errors import ConfigError

Content = Mapping[str, object]


def fault(key: str, message: str) -> ConfigError:
    return ConfigError(f"config.json: {key}", message)


def size(content: Content, key: str, default: int | None = None, prefix: str = "") -> int:
    """A positive integer; without a default the key is required."""
    value = content.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise fault(prefix + key, "is missing" if value is None else f"must be a positive integer, got {value!r}")
    return value


def positive(content: Content, key: str, default: float | None = None, prefix: str = "") -> float:
    """A positive finite number; without a default the key is required."""
    value = content.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise fault(prefix + key, "is missing" if value is None else f"must be a positive number, got {value!r}")
    return float(value)


def flag(content: Content, key: str) -> bool:
    """true or false, false when absent."""
    value = content.get(key)
    if not isinstance(value, bool | None):
        raise fault(key, f"must be true or false, got {value!r}")
    return bool(value)
