"""Every kernel compiles for the GPUs of three generations and fits into their shared memory; no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_kernels_compile_and_fit(capability: int, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A cache of its own: a kernel that was compiled by an earlier run would not be compiled again.
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", str(capability)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {result["kernel"] for result in results} == KERNELS
    too_large = [result for result in results if result["shared"] > SHARED_LIMIT[capability]]
    assert not too_large
