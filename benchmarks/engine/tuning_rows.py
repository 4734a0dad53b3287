"""Choices that are not those of the tuning table, for a measurement. Called by `baton bench engine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch

from baton.common.errors import ConfigError
from baton.engine.kernels import tuning
from baton.engine.kernels.tuning import FewConfig, Tuning


@contextmanager
def tried(few: Sequence[str], merges_last: bool, device: torch.device) -> Iterator[None]:
    """`few`: "ROWS KIND BLOCK_OUT BLOCK_IN NUM_WARPS NUM_STAGES SPLITS" each, how such products are computed meanwhile.

    `merges_last`: see `DecodeConfig`. Raises ConfigError.
    """
    generation = Tuning.of(device).generation
    table, rows = tuning._FEW.get(generation, {}), dict(parsed(text) for text in few)
    generations = tuning._MERGES_LAST | ({generation} if merges_last else set())
    with mock.patch.dict(table, rows), mock.patch.object(tuning, "_MERGES_LAST", generations):
        yield


def parsed(text: str) -> tuple[tuple[int, str], FewConfig]:
    try:
        rows, kind, *numbers = text.split()
        return (int(rows), kind), FewConfig(*map(int, numbers))
    except (TypeError, ValueError):
        raise ConfigError("few", f"{text!r} is not: rows, kind and five numbers") from None
