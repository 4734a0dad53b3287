"""The cluster that a chaos run disturbs: started for it, or running already, seen through its HTTP API.

Workers are found by what `/v1/workers` says of them and by the port that they listen on, so they must run on this
machine; faults that are injected by the workers themselves reach them through their supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from baton.chaos import processes
from baton.chaos.plan import ChaosPlan
from baton.cluster.serving import ServingCluster, serving_cluster
from baton.common.config import FaultSettings, load_config
from baton.common.errors import BatonError, ConfigError
from baton.engine.models.tiny import write_tiny_llama

RUN_MARKER = "BATON_CHAOS_RUN"
STATES = ("free", "cached", "running", "leased", "quarantined")
BUSY = ("running", "leased", "quarantined", "staging")
_DEFAULTS: dict[str, object] = {
    "cluster.prefill": 2,
    "cluster.decode": 2,
    "cluster.device": "cpu",
    "server.port": 0,
    "server.grpc_port": 0,
    "router.policy": "remote",
    "chaos.enabled": True,
}
_INJECT_S = 5.0
Inject = Callable[[FaultSettings], Awaitable[None]]
Blocks = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Worker:
    """An attached worker. `pid` is None when its process is gone, on another machine, or belongs to somebody else."""

    worker_id: str
    role: str
    address: str

    @property
    def pid(self) -> int | None:
        host, _, port = self.address.rpartition(":")
        return processes.listener_pid(host.strip("[]"), int(port))


@dataclass(frozen=True, slots=True)
class Size:
    """How many workers of each role make the cluster complete."""

    prefill: int
    decode: int


class TargetCluster:
    """`run_id` marks the processes that were started for this run; empty for a cluster that was running already."""

    def __init__(self, url: str, run_id: str, inject: Inject) -> None:
        self.url = url
        self.run_id = run_id
        self.inject = inject
        self._http = httpx.AsyncClient(base_url=url, timeout=10.0)

    async def close(self) -> None:
        await self._http.aclose()

    async def model_name(self) -> str:
        return str((await self._get("/v1/models"))["data"][0]["id"])

    async def workers(self) -> list[Worker]:
        """Those that the router is attached to."""
        content = await self._get("/v1/workers")
        return [Worker(w["id"], w["role"], w["address"]) for w in content["workers"] if w["attached"]]

    async def size(self) -> Size:
        roles = [worker.role for worker in await self.workers()]
        return Size(roles.count("prefill"), roles.count("decode"))

    async def is_complete(self, size: Size, without: frozenset[str] = frozenset()) -> bool:
        """All workers attached, none of them one of `without`, and all pairs connected."""
        content = await self._get("/v1/workers")
        ids = {w["id"] for w in content["workers"] if w["attached"]}
        connected = sum(pair["state"] == "connected" for pair in content["pairs"])
        return len(ids) == size.prefill + size.decode and not ids & without and connected == size.prefill * size.decode

    async def blocks(self) -> Blocks:
        """KV blocks by worker and state, each counted by the worker from its own list, and staging slots in use."""
        use: Blocks = {}
        for name, labels, value in _samples((await self._http.get("/metrics")).text):
            if name == "baton_kv_blocks":
                use.setdefault(labels["worker"], {})[labels["state"]] = value
            elif name == "baton_staging_slots_in_use":
                use.setdefault(labels["worker"], {})["staging"] = value
        return use

    async def counts(self) -> tuple[dict[str, int], dict[str, int], int]:
        """The router's attempts by outcome, requests by path, and how many frames about ended attempts it dropped."""
        outcomes: Counter[str] = Counter()
        paths: Counter[str] = Counter()
        fenced = 0
        for name, labels, value in _samples((await self._http.get("/metrics")).text):
            if name == "baton_attempts_total":
                outcomes[labels["outcome"]] += int(value)
            elif name == "baton_requests_total":
                paths[labels["path"]] += int(value)
            elif name == "baton_fenced_frames_total":
                fenced = int(value)
        return dict(outcomes), dict(paths), fenced

    async def _get(self, path: str) -> dict[str, Any]:
        response = await self._http.get(path)
        response.raise_for_status()
        content: dict[str, Any] = response.json()
        return content

    def processes(self) -> list[int]:
        """Processes of this run that are alive."""
        return processes.with_environment(RUN_MARKER, self.run_id) if self.run_id else []


@contextlib.asynccontextmanager
async def target_cluster(plan: ChaosPlan, model: Path, announce: Callable[[str], None]) -> AsyncIterator[TargetCluster]:
    """The cluster of `plan`; one that was started for it is stopped on leaving."""
    if plan.attach is not None:
        target = TargetCluster(plan.attach, "", _cannot_inject)
        try:
            yield target
        finally:
            await target.close()
        return
    run_id = uuid.uuid4().hex
    os.environ[RUN_MARKER] = run_id  # inherited by Ray's processes and by the workers
    config = load_config(None, {**_DEFAULTS, "model": str(model), "chaos.seed": plan.seed, **plan.config})
    async with serving_cluster(config, announce, show_worker_logs=False) as cluster:
        url = f"http://{config.server.host}:{cluster.router.http_port}"
        target = TargetCluster(url, run_id, lambda settings: _inject(cluster, settings))
        try:
            yield target
        finally:
            await target.close()


async def _inject(cluster: ServingCluster, settings: FaultSettings) -> None:
    """Tell every worker. One that is down has no faults to inject: it comes back undisturbed."""
    roles = cluster.layout.roles()
    names = [f"{role}-{roles[:index].count(role)}" for index, role in enumerate(roles)]
    calls: list[Any] = [cluster.supervisor.actor(name).inject.remote(settings.model_dump_json()) for name in names]
    answers = [asyncio.wait_for(asyncio.wrap_future(call.future()), _INJECT_S) for call in calls]
    await asyncio.gather(*answers, return_exceptions=True)


async def _cannot_inject(settings: FaultSettings) -> None:
    raise ConfigError("faults", f"an attached cluster takes no {settings}: let chaos start one")


@contextlib.contextmanager
def model_directory(plan: ChaosPlan) -> Iterator[Path]:
    """The plan's model, or a tiny random one for the time of the block."""
    if plan.model is not None:
        if not plan.model.is_dir():
            raise BatonError(f"{plan.model} is no directory")
        yield plan.model
        return
    with tempfile.TemporaryDirectory(prefix="baton-chaos-") as directory:
        yield write_tiny_llama(Path(directory) / "tiny-llama")


def _samples(metrics: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value
