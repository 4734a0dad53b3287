"""Fixtures of the hand-over tests: a tiny checkpoint, and two connected workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from tests.support.tiny_model import make_tiny_llama
from tests.transfer.handover_cluster import Cluster, cluster, config


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def connected(model: Path) -> AsyncIterator[Cluster]:
    async with cluster(config(model)) as workers:
        await workers.connect()
        yield workers
