"""One cluster for all chaos tests: router in this process, two prefill and two decode workers as Ray actors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from baton.chaos.cluster import target_cluster
from baton.chaos.judge import Judge
from baton.chaos.load import Client
from baton.chaos.plan import ChaosPlan
from baton.chaos.reference import Reference
from tests.chaos.harness import Harness
from tests.support.oracle import GreedyOracle
from tests.support.tiny_model import make_tiny_llama

LEASE_S = 4.0


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("chaos") / "tiny")


@pytest.fixture(scope="session")
def oracle(model: Path) -> GreedyOracle:
    """Made before any cluster: loading it holds the process for seconds, in which routers would lose their workers."""
    return GreedyOracle.load(model)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running_cluster(model: Path, oracle: GreedyOracle) -> AsyncIterator[Harness]:
    config: dict[str, object] = {
        "transfer.lease_s": LEASE_S,
        "transfer.layer_groups": 3,
        "engine.max_num_batched_tokens": 128,
        "router.max_attempts": 8,  # faults that go on for seconds meet a request more than once
    }
    async with target_cluster(ChaosPlan(config=config), model, print) as cluster:
        client = Client(cluster.url, await cluster.model_name(), 60.0)
        size = await cluster.size()
        yield Harness(cluster, client, size, oracle, Judge(model, Reference(model)))
        await client.close()


@pytest_asyncio.fixture(loop_scope="session")
async def harness(running_cluster: Harness) -> AsyncIterator[Harness]:
    """Whole before every test, with all pairs in use, and no block or slot in use after it."""
    await running_cluster.complete()
    await running_cluster.trusted()
    yield running_cluster
    await running_cluster.at_rest(30.0)
