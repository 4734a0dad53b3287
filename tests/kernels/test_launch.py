"""Launches that are settled once per class of tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton.engine.kernels.launch import cdiv, is_packed, next_power_of_2, signature


def test_a_settled_launch_is_that_of_triton(tmp_path: Path) -> None:
    """The driver is handed the same arguments in the same order, for every kernel that is launched so."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.launch_twice"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {result["kernel"] for result in results} == {
        "rms_norm_kernel",
        "silu_mul_kernel",
        "rope_store_kernel",
        "prefill_attention_kernel",
        "decode_attention_kernel",
        "merge_splits_kernel",
        "few_linear_kernel",
        "thin_linear_kernel",
        "move_blocks_kernel",
        "finish_fingerprints_kernel",
    }
    assert [result["kernel"] for result in results if not result["same"]] == []


def test_what_a_compiled_kernel_depends_on_makes_another_signature() -> None:
    x = torch.zeros(8, 16)
    assert signature(x) == signature(torch.ones(8, 16))
    others = [x[1:], x.T, x.double(), x[:, :15], x.flatten()[1:].as_strided((8, 15), (16, 1)), x.unsqueeze(0)]
    assert len({signature(x), *(signature(other) for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 127, 128, 129])
def test_powers_of_two(n: int) -> None:
    assert next_power_of_2(n) == min(1 << exponent for exponent in range(9) if 1 << exponent >= n)
    assert cdiv(n, 4) == (n + 3) // 4


def test_packed_is_contiguous() -> None:
    x = torch.zeros(4, 1, 6)
    for view in (x, x[1:], x[:, :, :5], x.transpose(0, 2), x[::2], x[:1, :, :3], x[0], x.expand(4, 3, 6), x[:0]):
        assert is_packed(view.shape, view.stride()) == (view.is_contiguous() or view.numel() == 0)
