"""`baton chaos --attach` as users call it, against a cluster that runs: disturbed from outside, judged, left.

The plan is benchmarks/chaos/soak.yaml in short: mixed load while workers are killed and clients leave.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.cli.main import main
from tests.chaos.harness import Harness
from tests.support.tiny_model import make_tiny_llama

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(150), pytest.mark.asyncio(loop_scope="session")]
LOAD: dict[str, object] = {
    "requests": 40,
    "duration_s": 10.0,
    "concurrency": 6,
    "prompt_tokens": [1, 300],
    "output_tokens": [8, 96],
    "with_stop": 0.2,
    "with_logprobs": 0.2,
    "cancelled": 0.1,
    "think_s": 0.5,
}
FAULTS = [
    {"kind": "kill", "role": "prefill", "at_s": 1.0},
    {"kind": "kill", "role": "decode", "at_s": 5.0},
    {"kind": "aborts", "clients": 50, "at_s": 3.0},
]


async def chaos(plan: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of `baton chaos`."""
    command = [sys.executable, "-m", "baton", "chaos", str(plan), *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode is not None
    return process.returncode, output.decode()


def written(plan: Path, content: dict[str, Any]) -> Path:
    plan.write_text(yaml.safe_dump(content), encoding="utf-8")
    return plan


async def test_a_running_cluster_is_disturbed_and_judged(harness: Harness, model: Path, tmp_path: Path) -> None:
    before = {worker.worker_id for worker in await harness.cluster.workers()}
    plan, out = written(tmp_path / "plan.yaml", {"seed": 6, "load": LOAD, "faults": FAULTS}), tmp_path / "out.json"
    code, output = await chaos(plan, "--attach", harness.cluster.url, "--model", str(model), "--out", str(out))
    assert code == 0, output
    assert "all invariants held" in output
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["ok"] is True
    assert result["requests"] >= 40
    assert set(result["faults"]) >= {"kill -9 prefill worker", "kill -9 decode worker", "50 disconnects"}
    left = {worker.worker_id for worker in await harness.cluster.workers()}
    assert len(left) == len(before) == len(left & before) + 2, "two workers were killed and came back as others"


async def test_tokens_of_another_model_are_wrong_and_the_exit_code_says_so(
    harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread of this process, which spares the imports of another one."""
    other = make_tiny_llama(tmp_path / "other", seed=99)
    plan = written(tmp_path / "plan.yaml", {"load": {**LOAD, "requests": 3, "duration_s": 0.0}})
    arguments = ["chaos", str(plan), "--attach", harness.cluster.url, "--model", str(other)]
    monkeypatch.setattr("sys.argv", ["baton", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        await asyncio.to_thread(main)
    assert exit_info.value.code == 1
    output = capsys.readouterr().out
    assert "VIOLATED" in output
    assert "is not the model's" in output
