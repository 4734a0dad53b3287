"""The tuning tables give settings that the kernels can be launched with, on every GPU generation."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels.tuning import Tuning


@pytest.mark.parametrize("generation", [8, 9, 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_tiles_divide_blocks_or_are_divided_by_them(generation: int, dtype: torch.dtype, head_dim: int) -> None:
    tuning = Tuning(generation, num_sms=132)
    prefill, decode = tuning.prefill(head_dim, dtype), tuning.decode(head_dim, 8, dtype)
    for tile in (prefill.block_m, prefill.block_n, decode.block_n):
        assert tile >= 16
        assert tile & (tile - 1) == 0
    assert decode.programs * 8 >= 0.95 * 132  # one long sequence alone can fill the GPU


def test_more_kv_heads_than_programs_still_decode() -> None:
    assert Tuning(9, num_sms=2).decode(64, 4096, torch.float16).programs == 1


def test_head_dim_above_the_tables() -> None:
    with pytest.raises(ValueError, match="head_dim 512"):
        Tuning(9, 132).prefill(512, torch.float16)


def test_the_cpu_has_settings_for_the_interpreter() -> None:
    assert Tuning.of(torch.device("cpu")).num_sms >= 1
