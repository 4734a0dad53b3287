"""Places one Ray actor per worker, keeps it alive and tells the router where it is.

Ray decides where a worker runs and restarts its process; whether a worker is usable is decided by the router's own
heartbeats, which notice a fault long before Ray does. The supervisor runs in the process that called `ray.init`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from baton.cluster.layout import ClusterLayout, Role
from baton.common.config import BatonConfig
from baton.common.errors import BatonError
from decode_worker.actor import DecodeWorker
from kv_transfer.connection import nccl_environment
from prefill_worker.actor import PrefillWorker

log = logging.getLogger(__name__)

_ACTOR_CLASSES: Mapping[Role, type] = {"prefill": PrefillWorker, "decode": DecodeWorker}


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a started worker listens."""

    name: str
    role: Role
    worker_id: str
    address: str


class Supervisor:
    """Owns the worker actors and their placement group. All methods run on one asyncio loop.

    `on_members` is called with the addresses of all live workers whenever one starts, restarts or is lost.
    """

    def __init__(
        self, config: BatonConfig, layout: ClusterLayout, on_members: Callable[[list[WorkerAddress]], None]
    ) -> None:
        self._config = config
        self._layout = layout
        self._on_members = on_members
        self._group: PlacementGroup | None = None
        self._actors: dict[str, ActorHandle[Any]] = {}
        self._members: dict[str, WorkerAddress] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        """Place and start all workers. Raises BatonError when Ray cannot place them or one fails to start."""
        roles = self._layout.roles()
        timeout = self._config.cluster.start_timeout_s
        self._group = placement_group([self._bundle(role) for role in roles], strategy="SPREAD")
        try:
            await asyncio.wait_for(_as_awaitable(self._group.ready()), timeout)
        except TimeoutError:
            raise BatonError(
                f"Ray found no room for {self._layout.describe()} within {timeout:.0f} s; "
                f"the cluster offers {ray.cluster_resources()}"
            ) from None
        counts: dict[Role, int] = {"prefill": 0, "decode": 0}
        started = []
        for bundle, role in enumerate(roles):
            name = f"{role}-{counts[role]}"
            counts[role] += 1
            self._actors[name] = self._create(role, bundle)
            started.append(self._start_worker(name, role))
        await asyncio.gather(*started)
        for name, role in zip(self._actors, roles, strict=True):
            self._watchers.append(asyncio.create_task(self._watch(name, role), name=f"watch-{name}"))

    async def drain(self) -> None:
        """Let the workers finish what they have, at most `cluster.drain_timeout_s`."""
        timeout = self._config.cluster.drain_timeout_s
        calls = [_as_awaitable(actor.drain.remote(timeout)) for actor in self._actors.values()]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                log.warning("a worker did not drain: %s", result)

    async def stop(self) -> None:
        """End all workers and give their resources back. Idempotent."""
        self._stopping = True
        self._on_members([])
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        stops = [asyncio.wait_for(_as_awaitable(actor.stop.remote()), 10.0) for actor in self._actors.values()]
        for result in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(result, BaseException):
                log.warning("a worker did not stop by itself: %s", result)
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors.clear()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    @property
    def placement_group(self) -> PlacementGroup:
        """Where the workers are placed: bundle i holds the i-th of `layout.roles()`. Raises BatonError before start."""
        if self._group is None:
            raise BatonError("the workers are not placed: start the supervisor first")
        return self._group

    def actor(self, name: str) -> ActorHandle[Any]:
        """The actor of a worker, by the name in WorkerAddress. Raises KeyError."""
        return self._actors[name]

    def _bundle(self, role: Role) -> dict[str, float]:
        extra = self._config.cluster.prefill_resources if role == "prefill" else self._config.cluster.decode_resources
        gpus = {"GPU": 1.0} if self._layout.device == "cuda" else {}
        return {"CPU": 1.0, **gpus, **extra}

    def _create(self, role: Role, bundle: int) -> ActorHandle[Any]:
        resources = dict(self._bundle(role))
        placed: Any = ray.remote(_ACTOR_CLASSES[role]).options(
            num_cpus=resources.pop("CPU"),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=64,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement_group, bundle),
            runtime_env={"env_vars": nccl_environment()},
        )
        actor: ActorHandle[Any] = placed.remote()
        return actor

    async def _start_worker(self, name: str, role: Role) -> None:
        reply = await asyncio.wait_for(
            _as_awaitable(self._actors[name].start.remote(self._config.model_dump_json())),
            self._config.cluster.start_timeout_s,
        )
        self._members[name] = WorkerAddress(name, role, reply["worker_id"], reply["address"])
        self._on_members(list(self._members.values()))

    async def _watch(self, name: str, role: Role) -> None:
        """Wait for the worker's process to end; Ray restarts it, we start the worker in it again."""
        while not self._stopping:
            try:
                await _as_awaitable(self._actors[name].wait_closed.remote())
                return
            except RayError as error:
                log.warning("%s is lost: %s", name, str(error).splitlines()[0])
            self._members.pop(name, None)
            self._on_members(list(self._members.values()))
            await self._restart(name, role)

    async def _restart(self, name: str, role: Role) -> None:
        delay = 0.1
        while not self._stopping:
            try:
                await self._start_worker(name, role)
                log.info("%s is back", name)
                return
            except (RayError, TimeoutError) as error:
                log.info("%s is not back yet: %s", name, str(error).splitlines()[0] if str(error) else "timeout")
                await asyncio.sleep(delay)
                delay = min(2 * delay, 2.0)


async def _as_awaitable(reference: Any) -> Any:
    return await asyncio.wrap_future(reference.future())
