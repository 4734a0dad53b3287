"""The soak of benchmarks/chaos/soak.yaml, in short: mixed load while random workers are killed and clients leave."""

from __future__ import annotations

import pytest

from baton.chaos.plan import checked_plan
from baton.chaos.report import rows
from baton.chaos.result import Result
from baton.chaos.run import disturb
from tests.chaos.harness import Harness

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200), pytest.mark.asyncio(loop_scope="session")]
PLAN: dict[str, object] = {
    "seed": 6,
    "load": {
        "requests": 40,
        "duration_s": 18.0,
        "concurrency": 6,
        "prompt_tokens": [1, 300],
        "output_tokens": [8, 96],
        "with_stop": 0.2,
        "with_logprobs": 0.2,
        "cancelled": 0.1,
        "think_s": 0.5,
    },
    "faults": [{"kind": "kill", "at_s": 2, "every_s": 7, "count": 2}, {"kind": "aborts", "clients": 50, "at_s": 12}],
}


async def test_a_short_soak(harness: Harness) -> None:
    result = Result()
    await disturb(checked_plan(PLAN), harness.cluster, 256, result, print)
    harness.judge.judge(result, print)
    table = {name: (row.injected, f"{row.stall_s:.1f} s", f"{row.whole_s:.1f} s") for name, row in rows(result).items()}
    print(
        f"{len(result.streams)} requests, {len(result.faults)} faults {table}: {len(result.lost)} lost, "
        f"{len(result.wrong)} wrong, {sum(result.near_ties.values())} near-ties, {result.blocks_leaked} blocks leaked"
    )
    assert result.is_good, (result.lost, result.wrong, result.problems)
    assert len(result.streams) >= 40
    assert len(result.faults) == 3
