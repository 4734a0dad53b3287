"""Every kernel compiles for the GPUs of three generations and fits into their shared memory; no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Bytes that one program may use.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
KERNELS = {
    "prefill_attention_kernel",
    "decode_attention_kernel",
    "merge_splits_kernel",
    "rope_store_kernel",
    "rms_norm_kernel",
    "silu_mul_kernel",
    "move_blocks_kernel",
    "finish_fingerprints_kernel",
    "row_max_kernel",
    "limits_kernel",
    "race_kernel",
    "winner_kernel",
    "decode_inputs_kernel",
    "greedy_parts_kernel",
    "greedy_winner_kernel",
    "thin_linear_kernel",
    "few_linear_kernel",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of all generations, in one process: to import torch and Triton takes as long as several kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A cache of its own: a kernel that was compiled by an earlier run would not be compiled again.
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", *map(str, SHARED_LIMIT)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_kernels_compile_and_fit(capability: int, results: list[dict[str, Any]]) -> None:
    of_generation = [result for result in results if result["capability"] == capability]
    assert {result["kernel"] for result in of_generation} == KERNELS
    assert not [result for result in of_generation if result["shared"] > SHARED_LIMIT[capability]]
