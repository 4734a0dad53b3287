"""Actors that die, that cannot be constructed, and that do not come up, on a real Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from baton.cluster import supervisor as module
from baton.cluster.controller import WorkerAddress
from baton.cluster.layout import choose_layout
from baton.cluster.ray_session import ray_session
from baton.cluster.supervisor import Supervisor
from baton.common.config import BatonConfig, load_config
from baton.common.errors import BatonError
from tests.cluster.flaky import Spell, flaky_controller, flaky_worker

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
WAIT_S = 90.0


@dataclass
class Members:
    """What the router would be told, in order."""

    seen: list[list[WorkerAddress]] = field(default_factory=list)

    async def until(self, condition: Callable[[list[WorkerAddress]], bool]) -> WorkerAddress:
        await until(lambda: bool(self.seen) and condition(self.seen[-1]))
        return self.seen[-1][0] if self.seen[-1] else WorkerAddress("", "decode", "", "")


@pytest.fixture(scope="module")
def config() -> Iterator[BatonConfig]:
    settings = load_config(
        None,
        {
            "model": ".",
            "cluster.prefill": 0,
            "cluster.decode": 1,
            "cluster.device": "cpu",
            "cluster.start_timeout_s": 90,
        },
    )
    with ray_session(settings, show_worker_logs=False):
        yield settings


@asynccontextmanager
async def supervised(config: BatonConfig, members: Members) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(config, choose_layout(config, 0), lambda addresses: members.seen.append(addresses))
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await supervisor.stop()


@pytest.fixture
def spell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spell:
    spell = Spell(tmp_path / "spell")
    monkeypatch.setattr(module, "_ACTOR_CLASSES", {"decode": flaky_worker(spell)})
    monkeypatch.setattr(module, "ClusterController", flaky_controller(spell))
    return spell


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_what_dies_comes_back(config: BatonConfig, spell: Spell, caplog: pytest.LogCaptureFixture) -> None:
    """Ray restarts a process that died, but gives an actor up for good when its constructor fails."""
    members = Members()
    async with supervised(config, members) as supervisor:
        await _worker_that_ends_its_process(supervisor, members)
        await _worker_that_once_cannot_be_constructed(supervisor, members, spell)
        assert "worker decode-0 is made anew" in caplog.text
        await _controller_that_once_cannot_be_constructed(supervisor, members, spell)


async def _worker_that_ends_its_process(supervisor: Supervisor, members: Members) -> None:
    first, actor = members.seen[-1][0], supervisor.actor("decode-0")
    actor.lose_engine.remote()
    await members.until(lambda now: not now)
    again = await members.until(bool)
    assert (again.name, again.worker_id != first.worker_id) == ("decode-0", True)
    assert supervisor.actor("decode-0") is actor


async def _worker_that_once_cannot_be_constructed(supervisor: Supervisor, members: Members, spell: Spell) -> None:
    first, actor = members.seen[-1][0], supervisor.actor("decode-0")
    spell.cast()
    actor.lose_engine.remote()
    await members.until(lambda now: not now)
    await until(lambda: supervisor.actor("decode-0") is not actor)
    spell.lift()
    again = await members.until(bool)
    assert again.worker_id != first.worker_id
    assert (await asyncio.wrap_future(supervisor.actor("decode-0").health.remote().future()))["role"] == "decode"


async def _controller_that_once_cannot_be_constructed(supervisor: Supervisor, members: Members, spell: Spell) -> None:
    controller, told = supervisor.controller, len(members.seen)
    spell.on_controller.cast()
    controller.end.remote()
    await until(lambda: supervisor.controller is not controller)
    spell.on_controller.lift()
    await until(lambda: len(members.seen) > told)
    assert [worker.name for worker in members.seen[-1]] == ["decode-0"]


@pytest.mark.parametrize("who", ["worker decode-0", "the controller"])
async def test_a_cluster_that_cannot_be_constructed_says_why(config: BatonConfig, spell: Spell, who: str) -> None:
    (spell if who == "worker decode-0" else spell.on_controller).cast()
    with pytest.raises(BatonError, match=rf"{who} did not start: .*OSError: the disk is full"):
        async with supervised(config, Members()):
            pass


async def test_a_worker_that_does_not_come_up_is_not_awaited_for_ever(config: BatonConfig, spell: Spell) -> None:
    spell.hanging.cast()
    cluster = config.cluster.model_copy(update={"start_timeout_s": 8.0})
    with pytest.raises(BatonError, match=r"within 8 s: raise cluster.start_timeout_s"):
        async with supervised(config.model_copy(update={"cluster": cluster}), Members()):
            pass
