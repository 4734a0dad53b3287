"""The same hand-over with real NCCL between two GPUs, Triton kernels and CUDA streams."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from tests.cluster.load import mixed_jobs, run_jobs
from tests.support.at_rest import wait_at_rest
from tests.support.oracle import GreedyOracle
from tests.support.serving import serve
from tests.support.tiny_model import make_tiny_llama

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs on this machine"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hand_over_over_nccl(tmp_path: Path, dtype: str) -> None:
    """float32 is compared token by token with transformers; bfloat16 must run, end and leave nothing."""
    model = make_tiny_llama(tmp_path / "tiny", hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=6)
    jobs = mixed_jobs(200, seed=4)
    arguments = ("--prefill", "1", "--decode", "1", "--device", "cuda", "--dtype", dtype, "--policy", "remote")
    with serve(model, *arguments) as server:
        answers = asyncio.run(run_jobs(server.url, server.grpc_target, "tiny", jobs, concurrency=32))
        asyncio.run(wait_at_rest(server.url, num_workers=2, timeout_s=5.0))
        assert sum(answer.path == "remote" for answer in answers) > 150
        if dtype == "float32":
            oracle = GreedyOracle.load(model)
            for job, answer in zip(jobs, answers, strict=True):
                if job.temperature == 0:
                    oracle.check(list(job.prompt), list(answer.token_ids))
            print(f"{oracle.checked_tokens} greedy tokens checked, {oracle.near_ties} near-ties")
        assert server.interrupt() == 0, server.text()
        assert not server.processes()
