"""Places one Ray actor per worker and a controller over them, and tells the router where the workers are.

Ray decides where a worker runs and restarts its process; whether a worker is usable is decided by the router's own
heartbeats, which notice a fault long before Ray does. An actor whose constructor fails Ray gives up for good: then the
supervisor makes another. The supervisor runs in the process that called `ray.init` and
owns all the actors: when that process ends, however it ends, Ray ends them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from baton.cluster.controller import ClusterController, Membership, WorkerAddress, cause_of, failed_to_construct
from baton.cluster.layout import ClusterLayout, Role
from baton.common.config import BatonConfig
from baton.common.errors import BatonError
from baton.worker.threads import run_in_thread
from decode_worker.actor import DecodeWorker
from kv_transfer.connection import nccl_environment
from prefill_worker.actor import PrefillWorker

log = logging.getLogger(__name__)

_ACTOR_CLASSES: Mapping[Role, type] = {"prefill": PrefillWorker, "decode": DecodeWorker}
_POLL_S, _RETRY_S, _STOP_S = 30.0, 0.2, 10.0


class Supervisor:
    """Owns the actors and their placement group. All methods run on one asyncio loop.

    `on_members` is called with the addresses of all live workers whenever one starts, restarts or is lost.
    """

    def __init__(
        self, config: BatonConfig, layout: ClusterLayout, on_members: Callable[[list[WorkerAddress]], None]
    ) -> None:
        self._config = config
        self._layout = layout
        self._on_members = on_members
        self._namespace = f"baton-{secrets.token_hex(4)}"
        roles = layout.roles()
        self._workers = {f"{role}-{roles[:index].count(role)}": role for index, role in enumerate(roles)}
        self._group: PlacementGroup | None = None
        self._actors: dict[str, ActorHandle[Any]] = {}
        self._controller: ActorHandle[Any] | None = None
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Place and start all workers. Raises BatonError when Ray cannot place them or one fails to start."""
        await self._place()
        for name in self._workers:
            self._actors[name] = self._create(name)
        self._controller = self._create_controller()
        timeout = self._config.cluster.start_timeout_s
        try:
            async with asyncio.timeout(timeout):
                await self._follow_until(self._all_started)
        except TimeoutError:
            message = f"the workers did not start within {timeout:.0f} s: raise cluster.start_timeout_s"
            raise BatonError(message) from None
        self._follower = asyncio.create_task(self._follow_until(lambda _: False), name="follow-membership")
        self._follower.add_done_callback(_report_defect)

    async def drain(self) -> None:
        """Let the workers finish what they have, at most `cluster.drain_timeout_s`."""
        timeout = self._config.cluster.drain_timeout_s
        # Without its GCS, Ray lets calls wait for ever.
        calls = [_within(actor.drain.remote(timeout), timeout + _STOP_S) for actor in self._actors.values()]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                log.warning("a worker did not drain: %s", result)

    async def stop(self) -> None:
        """End all workers and give their resources back. Idempotent."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        self._on_members([])
        actors = list(self._actors.values())
        calls: list[Any] = [actor.stop.remote() for actor in actors]
        if self._controller is not None:
            calls.insert(0, self._controller.close.remote())
            actors.append(self._controller)
        for result in await asyncio.gather(*(_within(call, _STOP_S) for call in calls), return_exceptions=True):
            if isinstance(result, BaseException):
                log.warning("a worker did not stop by itself: %s", result)
        try:
            await asyncio.wait_for(run_in_thread(partial(_kill, actors, self._group), "kill actors"), _STOP_S)
        except TimeoutError:
            log.warning("Ray's GCS does not answer: the actors end with their raylet")
        self._actors.clear()
        self._controller = None
        self._group = None

    @property
    def placement_group(self) -> PlacementGroup:
        """Where the workers are placed: bundle i holds the i-th of `layout.roles()`. Raises BatonError before start."""
        if self._group is None:
            raise BatonError("the workers are not placed: start the supervisor first")
        return self._group

    @property
    def controller(self) -> ActorHandle[Any]:
        """The ClusterController actor. Raises BatonError before start."""
        if self._controller is None:
            raise BatonError("there is no controller: start the supervisor first")
        return self._controller

    def actor(self, name: str) -> ActorHandle[Any]:
        """The actor of a worker, by the name in WorkerAddress. Raises KeyError."""
        return self._actors[name]

    # ---- placement

    async def _place(self) -> None:
        bundles = [self._resources(role) for role in self._layout.roles()]
        self._group = placement_group(bundles, strategy="SPREAD")
        timeout = self._config.cluster.start_timeout_s
        try:
            await _within(self._group.ready(), timeout)
        except TimeoutError:
            raise BatonError(
                f"Ray found no room for {self._layout.describe()} within {timeout:.0f} s; "
                f"the cluster offers {ray.cluster_resources()}"
            ) from None

    def _resources(self, role: Role) -> dict[str, float]:
        extra = self._config.cluster.prefill_resources if role == "prefill" else self._config.cluster.decode_resources
        gpus = {"GPU": 1.0} if self._layout.device == "cuda" else {}
        return {"CPU": 1.0, **gpus, **extra}

    def _create(self, name: str) -> ActorHandle[Any]:
        role, bundle = self._workers[name], list(self._workers).index(name)
        resources = self._resources(role)
        placed: Any = ray.remote(_ACTOR_CLASSES[role]).options(
            name=name,
            namespace=self._namespace,
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

    def _create_controller(self) -> ActorHandle[Any]:
        options: Any = ray.remote(ClusterController).options(
            name="controller", namespace=self._namespace, num_cpus=0, max_restarts=-1, max_task_retries=0
        )
        actor: ActorHandle[Any] = options.remote(self._namespace, self._workers, self._config.model_dump_json())
        return actor

    async def _replace(self, given_up: Mapping[str, str]) -> None:
        """Make actors anew that Ray will not restart. An id that is not the present one's was replaced already."""
        for name, actor_id in given_up.items():
            old = self._actors[name]
            if old._actor_id.hex() == actor_id:
                log.warning("worker %s is made anew", name)
                self._actors[name] = await _in_place_of(old, partial(self._create, name))

    # ---- membership

    async def _follow_until(self, enough: Callable[[Membership], bool]) -> None:
        """Hand every change of the membership on. A controller that is away changes nothing until it is back."""
        seen = -1
        while True:
            try:
                membership: Membership = await _as_awaitable(self.controller.membership.remote(seen, _POLL_S))
            except RayError as error:
                log.warning("the controller is away: %s", cause_of(error))
                if failed_to_construct(error):
                    if self._follower is None:
                        raise BatonError(f"the controller did not start: {cause_of(error)}") from error
                    self._controller = await _in_place_of(self.controller, self._create_controller)
                seen = -1
                await asyncio.sleep(_RETRY_S)
                continue
            if membership.version != seen:
                self._on_members(list(membership.members))
            seen = membership.version
            if enough(membership):
                return
            await self._replace(membership.given_up)

    def _all_started(self, membership: Membership) -> bool:
        """Raises BatonError when a worker cannot start: at the start of a cluster, nothing is tried twice."""
        for name, reason in membership.errors.items():
            raise BatonError(f"worker {name} did not start: {reason}")
        return len(membership.members) == len(self._actors)


def _report_defect(follower: asyncio.Task[None]) -> None:
    """Without its follower the router keeps the workers that it knows: better than to end, but somebody must know."""
    if not follower.cancelled() and (defect := follower.exception()) is not None:
        log.error("the membership is no longer followed", exc_info=defect)


def _kill(actors: Iterable[ActorHandle[Any]], group: PlacementGroup | None) -> None:
    """Blocks for as long as Ray's GCS is away."""
    for actor in actors:
        ray.kill(actor, no_restart=True)
    if group is not None:
        remove_placement_group(group)


async def _in_place_of(old: ActorHandle[Any], create: Callable[[], ActorHandle[Any]]) -> ActorHandle[Any]:
    """The kill frees name and place of an actor that is dead already. Both calls block while Ray's GCS is away."""

    def replace() -> ActorHandle[Any]:
        ray.kill(old, no_restart=True)
        return create()

    try:
        return await run_in_thread(replace, "make an actor anew")
    except (RayError, ValueError):  # ValueError: its name is still taken
        log.exception("an actor could not be made anew")
        return old


async def _as_awaitable(reference: Any) -> Any:
    return await asyncio.wrap_future(reference.future())


async def _within(reference: Any, seconds: float) -> Any:
    return await asyncio.wait_for(_as_awaitable(reference), seconds)
