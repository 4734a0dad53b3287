"""Invariant I4 as a client sees it: when nothing runs, no block and no staging slot is in use on any worker."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import httpx
from prometheus_client.parser import text_string_to_metric_families

BUSY_STATES = ("running", "leased", "quarantined")
STATES = ("free", "cached", *BUSY_STATES)


async def wait_at_rest(url: str, num_workers: int, timeout_s: float) -> None:
    """Returns once all workers are at rest; raises AssertionError with what is in use after `timeout_s` seconds.

    At every look, the states of each worker, each counted from its own list, must add up to its total.
    """
    use: dict[str, dict[str, float]] = {}
    async with httpx.AsyncClient(base_url=url) as http:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < deadline:
            use = _blocks((await http.get("/metrics")).text)
            assert len(use) == num_workers, f"{len(use)} of {num_workers} workers report their blocks"
            for worker, states in use.items():
                assert sum(states[state] for state in STATES) == states["total"], (worker, states)
            if not any(states[state] for states in use.values() for state in (*BUSY_STATES, "staging")):
                return
            await asyncio.sleep(0.1)
    raise AssertionError(f"not at rest after {timeout_s} s: {use}")


def _blocks(metrics: str) -> dict[str, dict[str, float]]:
    use: dict[str, dict[str, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if family.name == "baton_kv_blocks":
                use[sample.labels["worker"]][sample.labels["state"]] = sample.value
            elif family.name == "baton_staging_slots_in_use":
                use[sample.labels["worker"]]["staging"] = sample.value
    return use
