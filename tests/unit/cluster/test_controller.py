"""The controller over stand-ins for Ray's actors: who is a member, what is said of those that are not, and restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayError

from baton.cluster import controller
from baton.cluster.controller import ClusterController, Membership

WAIT_S = 30.0


class Method:
    """`actor.method.remote(...)`, as Ray has it."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


class Worker:
    """An actor that can be killed: its process ends, and the next one has another id."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_processes = 1
        self.fault = ""
        self.num_waits = 0
        self.reachable = asyncio.Event()
        self.reachable.set()
        self._error = RayError("none")
        self._ended = asyncio.Event()
        self.start = Method(self._start)
        self.wait_closed = Method(self._wait_closed)

    async def _start(self, config: str) -> dict[str, str]:
        assert config == "{}"
        await self.reachable.wait()
        if self.fault:
            raise RayError(f"{self.fault}\nand a long trace")
        return {"worker_id": f"{self.name}#{self.num_processes}", "address": f"host:{self.num_processes}"}

    async def _wait_closed(self) -> None:
        self.num_waits += 1
        await self._ended.wait()
        self._ended.clear()
        raise self._error

    def die(self, error: RayError | None = None) -> None:
        self.num_processes += 1
        self.break_call(error or RayError("the actor died"))

    def break_call(self, error: RayError) -> None:
        """Whoever waits for the end is told this; the process goes on."""
        self._error = error
        self._ended.set()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Worker]:
    actors = {name: Worker(name) for name in ("decode-0", "prefill-0")}

    def get_actor(name: str, namespace: str) -> Worker:
        assert namespace == "n"
        if name not in actors:
            raise ValueError(f"no actor {name}")
        return actors[name]

    monkeypatch.setattr("baton.cluster.controller.ray.get_actor", get_actor)
    return actors


def made() -> ClusterController:
    return ClusterController("n", {"decode-0": "decode", "prefill-0": "prefill"}, "{}")


def ids(membership: Membership) -> set[str]:
    return {member.worker_id for member in membership.members}


async def test_all_are_started_and_those_that_die_are_started_again(workers: dict[str, Worker]) -> None:
    cluster = made()
    first = await cluster.membership(-1, WAIT_S)
    assert ids(first) == {"decode-0#1", "prefill-0#1"}
    assert {member.role for member in first.members} == {"decode", "prefill"}
    workers["decode-0"].die()
    without = await cluster.membership(first.version, WAIT_S)
    assert (ids(without), without.errors) == ({"prefill-0#1"}, {"decode-0": "the actor died"})
    again = await cluster.membership(without.version, WAIT_S)
    assert (ids(again), again.errors) == ({"decode-0#2", "prefill-0#1"}, {})
    await cluster.close()


UNAVAILABLE = ActorUnavailableError("the connection broke", None)


async def test_a_worker_out_of_rays_reach_for_a_moment_stays_a_member(workers: dict[str, Worker]) -> None:
    cluster = made()
    first = await cluster.membership(-1, WAIT_S)
    decode = workers["decode-0"]
    decode.break_call(UNAVAILABLE)
    async with asyncio.timeout(WAIT_S):
        while decode.num_waits < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert await cluster.membership(first.version, 0.0) == first
    decode.die()
    assert ids(await cluster.membership(first.version, WAIT_S)) == {"prefill-0#1"}
    await cluster.close()


@pytest.mark.parametrize("answers", [True, False], ids=["restarted", "silent"])
async def test_a_worker_of_which_ray_says_unavailable_and_that_is_another_or_silent_is_lost(
    workers: dict[str, Worker], monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    monkeypatch.setattr(controller, "_UNREACHABLE_S", WAIT_S if answers else 0.05)
    cluster = made()
    first = await cluster.membership(-1, WAIT_S)
    if not answers:
        workers["decode-0"].reachable.clear()
    workers["decode-0"].die(UNAVAILABLE)
    without = await cluster.membership(first.version, WAIT_S)
    assert ids(without) == {"prefill-0#1"}
    assert "the connection broke" in without.errors["decode-0"]
    workers["decode-0"].reachable.set()
    assert ids(await cluster.membership(without.version, WAIT_S)) == {"decode-0#2", "prefill-0#1"}
    await cluster.close()


async def test_a_worker_that_does_not_start_is_named_with_one_line_and_tried_again(workers: dict[str, Worker]) -> None:
    workers["prefill-0"].fault = "no such file"
    cluster = made()
    first = await cluster.membership(-1, WAIT_S)
    assert (ids(first), first.errors) == ({"decode-0#1"}, {"prefill-0": "no such file"})
    workers["prefill-0"].fault = ""
    seen = first.version
    while not ids(membership := await cluster.membership(seen, WAIT_S)) >= {"prefill-0#1"}:
        seen = membership.version
    assert membership.errors == {}
    await cluster.close()


async def test_an_actor_that_ray_does_not_know_yet_is_waited_for(workers: dict[str, Worker]) -> None:
    late = workers.pop("decode-0")
    cluster = made()
    first = await cluster.membership(-1, WAIT_S)
    assert first.errors == {"decode-0": "no actor decode-0"}
    workers["decode-0"] = late
    seen = first.version
    while (membership := await cluster.membership(seen, WAIT_S)).errors:
        seen = membership.version
    assert ids(membership) == {"decode-0#1", "prefill-0#1"}
    await cluster.close()


@pytest.mark.usefixtures("workers")
async def test_without_news_the_answer_comes_in_time_and_is_the_same() -> None:
    cluster = made()
    first = await cluster.membership(-1, WAIT_S)
    assert await cluster.membership(first.version, 0.01) == first
    await cluster.close()
