"""From what a tuning run measured to the flags of the run that tries it."""

from __future__ import annotations

import shlex

import pytest
import torch

from baton.common.errors import ConfigError
from baton.engine.kernels.tuning import FewConfig, Tuning
from benchmarks.engine.tuning_rows import few_rows, parsed

CPU = torch.device("cpu")


def test_rows_count_while_they_are_tried() -> None:
    weight = torch.empty(6144, 4096, dtype=torch.bfloat16, device="meta")
    tuning = Tuning.of(CPU)
    assert tuning.few(8, weight, "plain") is None, "cuBLAS is as fast"
    before = tuning.few(8, weight, "parts")
    with few_rows(["16 plain 64 128 4 4 1", "16 short 64 64 4 4 1"], CPU):
        assert tuning.few(8, weight, "plain") == FewConfig(64, 128, 4, 4, 1)
        assert tuning.few(8, weight, "parts") == FewConfig(64, 64, 4, 4, 1)
    assert tuning.few(8, weight, "plain") is None
    assert tuning.few(8, weight, "parts") == before
    for text in ("", "16 short", "x short 1 2 3 4 5", "16 short 1 2 3 4 5 6"):
        with pytest.raises(ConfigError, match="five numbers"):
            parsed(text)


def test_the_best_of_each_weight_where_it_beats_the_library() -> None:
    tune = pytest.importorskip("benchmarks.tune", exc_type=ImportError)
    rows = [
        {"name": "out rows 8 cuBLAS", "us": 20.0},
        {"name": "out rows 8 (64, 128, 4, 4, 2)", "us": 17.0},
        {"name": "out rows 8 (64, 128, 4, 5, 2)", "us": 18.0},
        {"name": "out rows 8 (64, 256, 4, 5, 2)", "failed": "no memory"},
        {"name": "gate rows 8 (64, 128, 4, 5, 4)", "us": 1.0},
        {"name": "out rows 64 cuBLAS", "us": 20.0},
        {"name": "out rows 64 (64, 128, 4, 5, 4)", "us": 20.5},
        {"name": "down rows 32 (128, 128, 8, 4, 4)", "us": 30.0},
        {"name": "qkv rows 32 (64, 128, 4, 5, 1)", "us": 15.0},
        {"name": "down rows 1 (16, 256, 4, 4)", "us": 3.0},
        {"name": "decode 1 x 2048 (64, 4, 4, 2, 1)", "us": 3.0},
    ]
    words = shlex.split(" ".join(tune.best_flags(rows)))
    assert words == [
        *("--few", "16 short 64 128 4 4 2"),
        *("--few", "32 long 128 128 8 4 4"),
        *("--few", "32 plain 64 128 4 5 1"),
    ]
    assert parsed(words[1]) == ((16, "short"), FewConfig(64, 128, 4, 4, 2))
