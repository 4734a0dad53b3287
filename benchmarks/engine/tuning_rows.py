"""Rows that are not in the tuning table, for a measurement. Called by `baton bench engine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch

from baton.common.errors import ConfigError
from baton.engine.kernels import tuning
from baton.engine.kernels.tuning import FewConfig, Tuning


@contextmanager
def few_rows(texts: Sequence[str], device: torch.device) -> Iterator[None]:
    """Each "ROWS KIND BLOCK_OUT BLOCK_IN NUM_WARPS NUM_STAGES SPLITS": how such products are computed meanwhile.

    Raises ConfigError.
    """
    table = tuning._FEW.get(Tuning.of(device).generation, {})
    with mock.patch.dict(table, dict(parsed(text) for text in texts)):
        yield


def parsed(text: str) -> tuple[tuple[int, str], FewConfig]:
    try:
        rows, kind, *numbers = text.split()
        return (int(rows), kind), FewConfig(*map(int, numbers))
    except (TypeError, ValueError):
        raise ConfigError("few", f"{text!r} is not: rows, kind and five numbers") from None
