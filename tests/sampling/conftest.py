"""One cluster for all tests of this folder, and the oracle of its model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from tests.sampling.live import PATHS, Live, Server, live
from tests.support.sampling_oracle import SamplingOracle
from tests.support.tiny_model import make_tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=5, std=0.2)


@pytest.fixture(scope="session")
def oracle(model: Path) -> SamplingOracle:
    return SamplingOracle.load(model)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster(model: Path) -> AsyncIterator[Live]:
    async with live(model) as running:
        yield running


@pytest.fixture(params=PATHS)
def server(cluster: Live, request: pytest.FixtureRequest) -> Server:
    """The same workers, asked to stay on one or to hand over."""
    return cluster.servers[request.param]
