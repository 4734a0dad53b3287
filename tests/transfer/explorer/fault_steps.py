"""Steps that are drawn from the fault budget."""

from __future__ import annotations

from typing import Any

from kv_transfer import events as ev
from kv_transfer.protocol import next_deadline
from tests.transfer.explorer import router
from tests.transfer.explorer.link_steps import epoch_of, unpacked, vanish
from tests.transfer.explorer.parts import Phase, PrefillEngine
from tests.transfer.explorer.perform import feed
from tests.transfer.explorer.worker_steps import put_work
from tests.transfer.explorer.world import BUDGET, PROTO, World


def refuse(world: World, worker: int, key: ev.AttemptKey) -> None:
    engine: PrefillEngine = world.engine(worker)
    work = next(item for item in engine.work if item.key == key)
    put_work(world, worker, engine.free, work, work._replace(computing=False))
    feed(world, worker, ev.PrefillFailed(key, "busy"))


def tick(world: World, worker: int) -> None:
    """Time passes at one worker until its next deadline; its reaper has ticked before that."""
    feed(world, worker, ev.Tick(world.state(worker).now))
    due = next_deadline(world.state(worker))
    if due is not None:
        feed(world, worker, ev.Tick(due))


def crash(world: World, worker: int) -> None:
    """The process dies and a new one takes its place: its sides of all epochs are gone at once."""
    model = world.model
    world.values[model.slot(worker, PROTO)] = model.fresh_protocol(worker)
    engine = world.engine(worker)
    fresh = model.fresh_engine(worker, engine.incarnation + 1)
    world.set_engine(worker, fresh)
    router.on_crash(world, worker)
    for slot in model.halves_of(worker):
        for epoch in world.half(slot).epochs:
            if epoch.side:
                vanish(world, slot, epoch)


def messages(world: World, channel: str, where: tuple[int, ...]) -> tuple[Any, ...]:
    if channel == "inbox":
        return world.values[world.model.inbox_slot(*where)]  # type: ignore[no-any-return]
    return epoch_of(world, *where)[1].inbound  # type: ignore[no-any-return]


def put_messages(world: World, channel: str, where: tuple[int, ...], held: tuple[Any, ...]) -> None:
    if channel == "inbox":
        world.values[world.model.inbox_slot(*where)] = held
        return
    slot, epoch, _, _ = epoch_of(world, *where)
    world.set_epoch(slot, epoch._replace(inbound=held))


def lose(world: World, channel: str, *where: int) -> None:
    put_messages(world, channel, where, messages(world, channel, where)[1:])
    mark_lossy(world, channel)


def dup(world: World, channel: str, *where: int) -> None:
    held = messages(world, channel, where)
    put_messages(world, channel, where, (*held, held[0]))


def swap(world: World, channel: str, *where: int) -> None:
    first, second, *rest = messages(world, channel, where)
    put_messages(world, channel, where, (second, first, *rest))
    mark_lossy(world, channel)


def mark_lossy(world: World, channel: str) -> None:
    budget = world.budget
    lossy = budget._replace(router_lossy=True) if channel == "inbox" else budget._replace(peer_lossy=True)
    world.values[BUDGET] = lossy


def cancel(world: World, index: int) -> None:
    router.abandon(world, index, None, Phase.CANCELLED)


def corrupt(world: World, worker: int, p: int, d: int, number: int) -> None:
    unpacked(world, worker, p, d, number, False)
