"""Prefill and decode on different Ray nodes (two raylets on this machine)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from baton.cluster.serving import serving_cluster
from baton.common.config import load_config
from tests.cluster.load import mixed_jobs, run_jobs
from tests.support.at_rest import wait_at_rest
from tests.support.oracle import GreedyOracle
from tests.support.tiny_model import make_tiny_llama

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    store = 80 * 1024 * 1024
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store})
    try:
        for role in ("prefill_node", "decode_node"):
            cluster.add_node(num_cpus=2, resources={role: 4.0}, object_store_memory=store)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


async def test_hand_over_between_nodes(two_nodes: Cluster, tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "tiny")
    config = load_config(
        None,
        {
            "model": str(model),
            "cluster.ray_address": two_nodes.address,
            "cluster.prefill": 2,
            "cluster.decode": 2,
            "cluster.device": "cpu",
            "cluster.prefill_resources": {"prefill_node": 1.0},
            "cluster.decode_resources": {"decode_node": 1.0},
            "router.policy": "remote",
            "server.port": 0,
            "server.grpc_port": 0,
        },
    )
    jobs = mixed_jobs(48, seed=3)
    async with serving_cluster(config) as cluster:
        nodes = placement_group_table(cluster.supervisor.placement_group)["bundles_to_node_id"]
        decode_nodes, prefill_nodes = {nodes[0], nodes[1]}, {nodes[2], nodes[3]}
        assert len(decode_nodes | prefill_nodes) == 2
        assert not decode_nodes & prefill_nodes

        url = f"http://127.0.0.1:{cluster.router.http_port}"
        answers = await run_jobs(url, f"127.0.0.1:{cluster.router.grpc_port}", "tiny", jobs, concurrency=16)
        await wait_at_rest(url, num_workers=4, timeout_s=5.0)
    assert sum(answer.path == "remote" for answer in answers) > 36
    oracle = GreedyOracle.load(model)
    for job, answer in zip(jobs, answers, strict=True):
        if job.temperature == 0:
            oracle.check(list(job.prompt), list(answer.token_ids))
