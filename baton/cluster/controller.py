"""The cluster's controller: a Ray actor that keeps workers started and knows where each of them listens.

It holds nothing that cannot be asked for again. When its process dies, Ray restarts it; it finds the workers by name
and asks each to start, which a running worker answers with the address it already has. Requests never pass it, so they
go on while it is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from baton.cluster.layout import Role

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 2.0
_UNREACHABLE_S = 1.0  # a broken connection is made again sooner, a process that has died takes longer


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a started worker listens."""

    name: str
    role: Role
    worker_id: str
    address: str


@dataclass(frozen=True, slots=True)
class Membership:
    """`version` grows with every change. `errors`: why a worker is not a member, by name.

    `given_up`: actor ids of those whose constructor failed, by name: Ray restarts a process that dies, but not these.
    """

    version: int
    members: tuple[WorkerAddress, ...]
    errors: dict[str, str]
    given_up: dict[str, str]


def failed_to_construct(error: BaseException) -> bool:
    """Whether Ray has given an actor up because its constructor raised."""
    return isinstance(error, ActorDiedError) and bool(error.actor_init_failed)


def cause_of(error: BaseException) -> str:
    """One line for people. Of a constructor's error Ray's text ends with what was raised."""
    lines = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
    return f"its actor could not be made: {lines[-1]}" if failed_to_construct(error) else lines[0]


class ClusterController:
    """All methods run on the actor's asyncio loop. `workers`: name and role of each, actors of Ray's `namespace`."""

    def __init__(self, namespace: str, workers: dict[str, Role], config_json: str) -> None:
        self._namespace = namespace
        self._workers = workers
        self._config_json = config_json
        self._members: dict[str, WorkerAddress] = {}
        self._errors: dict[str, str] = {}
        self._given_up: dict[str, str] = {}
        self._version = 0
        self._changed = asyncio.Event()
        self._keepers: list[asyncio.Task[None]] = []

    async def membership(self, seen: int, wait_s: float) -> Membership:
        """The members once every worker was asked and their version differs from `seen`; at the latest after `wait_s`.

        The first call makes the controller start all workers and keep them started.
        """
        if not self._keepers:
            self._keepers = [asyncio.create_task(self._keep(name), name=f"keep-{name}") for name in self._workers]
        try:
            async with asyncio.timeout(wait_s):
                while self._version == seen or not self._all_asked():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        return Membership(self._version, tuple(self._members.values()), dict(self._errors), dict(self._given_up))

    async def close(self) -> None:
        """Stop keeping workers started."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def _all_asked(self) -> bool:
        return len(self._members) + len(self._errors) == len(self._workers)

    async def _keep(self, name: str) -> None:
        """Start the worker, wait for the end of its process, which Ray restarts, and start the worker in it again."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                actor = ray.get_actor(name, self._namespace)
                await self._start(name, actor)
                backoff_s = _FIRST_BACKOFF_S
                await self._until_closed(name, actor)
                return
            except (RayError, ValueError) as error:  # ValueError: no actor has this name
                self._lost(name, error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _until_closed(self, name: str, actor: Any) -> None:
        """Returns when the worker has ended by itself; raises what ended its process.

        Ray says "unavailable" of a process that it restarts, and also when only its connection broke.
        """
        while True:
            try:
                await actor.wait_closed.remote()
                return
            except ActorUnavailableError as error:
                if not await self._is_still_there(name, actor):
                    raise
                log.warning("%s was out of Ray's reach: %s", name, cause_of(error))
                await asyncio.sleep(_FIRST_BACKOFF_S)

    async def _is_still_there(self, name: str, actor: Any) -> bool:
        """Whether the process that is a member answers within _UNREACHABLE_S. A new one has another worker_id."""
        try:
            async with asyncio.timeout(_UNREACHABLE_S):
                while True:
                    with contextlib.suppress(ActorUnavailableError):
                        reply = await actor.start.remote(self._config_json)
                        return bool(reply["worker_id"] == self._members[name].worker_id)
                    await asyncio.sleep(_FIRST_BACKOFF_S)
        except TimeoutError:
            return False

    async def _start(self, name: str, actor: Any) -> None:
        reply = await actor.start.remote(self._config_json)
        self._errors.pop(name, None)
        self._given_up.pop(name, None)
        self._members[name] = WorkerAddress(name, self._workers[name], reply["worker_id"], reply["address"])
        self._announce()

    def _lost(self, name: str, error: Exception) -> None:
        reason = cause_of(error)
        log.warning("%s is not running: %s", name, reason)
        self._members.pop(name, None)
        self._given_up.pop(name, None)
        self._errors[name] = reason
        if failed_to_construct(error):
            self._given_up[name] = str(error.actor_id)  # type: ignore[attr-defined]
        self._announce()

    def _announce(self) -> None:
        self._version += 1
        self._changed.set()
