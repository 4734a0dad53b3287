"""Steps of one worker: a command arrives, its engine moves on."""

from __future__ import annotations

from kv_transfer import events as ev
from tests.transfer.explorer import router
from tests.transfer.explorer.config import DEADLINE_S
from tests.transfer.explorer.parts import (
    CancelCommand,
    DecodeEngine,
    OpenCommand,
    PrefillCommand,
    PrefillEngine,
    PrefillWork,
    Running,
)
from tests.transfer.explorer.perform import feed
from tests.transfer.explorer.plans import may_see_time
from tests.transfer.explorer.segments import segment_of
from tests.transfer.explorer.world import World


def command(world: World, request: int, role: int) -> None:
    """The oldest command about a request arrives at its prefill or decode worker. No two deadlines fall due at once."""
    slot = world.model.inbox_slot(request, role)
    worker = router.workers_of(world, request)[role]
    command, *rest = world.values[slot]
    world.values[slot] = tuple(rest)
    apart = len(world.engine(worker).deadlines) if may_see_time(world.model, world.budget, worker) else 0
    deadline = world.state(worker).now + DEADLINE_S + apart
    match command:
        case OpenCommand(key, base):
            world.opening = base
            note_deadline(world, worker, key, deadline)
            spec = world.model.spec(key)
            feed(world, worker, ev.OpenRequested(key, world.model.names[spec.prefill], spec.num_blocks, deadline))
        case PrefillCommand(key, base, lease, first_block):
            world.opening = base
            note_deadline(world, worker, key, deadline)
            peer = world.model.names[world.model.config.prefills + world.model.spec(key).decode]
            feed(world, worker, ev.PrefillRequested(key, peer, lease, first_block, deadline))
        case CancelCommand(key):
            feed(world, worker, ev.Cancel(key))
            stop_running(world, worker, key)


def note_deadline(world: World, worker: int, key: ev.AttemptKey, deadline: float) -> None:
    engine = world.engine(worker)
    if all(known != key for known, _ in engine.deadlines):
        deadlines = tuple(sorted((*engine.deadlines, (key, deadline))))
        world.set_engine(worker, engine._replace(deadlines=deadlines))


def stop_running(world: World, worker: int, key: ev.AttemptKey) -> None:
    """A cancelled attempt that decode admitted is the engine's business, no longer the protocol's."""
    engine = world.engine(worker)
    if isinstance(engine, DecodeEngine):
        for running in engine.running:
            if running.key == key:
                free_running(world, worker, running)


def free_running(world: World, worker: int, running: Running) -> None:
    engine: DecodeEngine = world.engine(worker)
    left = tuple(other for other in engine.running if other is not running)
    world.set_engine(worker, engine._replace(running=left, free=tuple(sorted((*engine.free, *running.blocks)))))


def decode(world: World, worker: int, running: Running) -> None:
    free_running(world, worker, next(other for other in world.engine(worker).running if other == running))
    world.tell_router("token", running.key, running.position)


def reply(world: World, worker: int, key: ev.AttemptKey) -> None:
    """The engine answers a reservation, in any order."""
    engine: DecodeEngine = world.engine(worker)
    event = next(event for asked, event in engine.replies if asked == key)
    left = tuple(reply for reply in engine.replies if reply[0] != key)
    world.set_engine(worker, engine._replace(replies=left))
    feed(world, worker, event)


def compute(world: World, worker: int, key: ev.AttemptKey) -> None:
    """The prefill engine writes the next segment, or samples the first token after the last one."""
    engine: PrefillEngine = world.engine(worker)
    work = next(item for item in engine.work if item.key == key)
    spec = world.model.spec(key)
    free = engine.free if work.holds else engine.free - spec.num_blocks
    if work.stage < spec.chunks:
        after = work._replace(stage=work.stage + 1, holds=True)
        put_work(world, worker, free, work, after)
        feed(world, worker, ev.SegmentReady(key, segment_of(spec, work.stage), 1))
        return
    put_work(world, worker, free, work, work._replace(holds=True, computing=False))
    world.tell_router("token", key, work.base)
    feed(world, worker, ev.PrefillDone(key, spec.num_blocks, 0, ended=work.base + 1 == spec.tokens))


def put_work(world: World, worker: int, free: int, work: PrefillWork, after: PrefillWork) -> None:
    engine: PrefillEngine = world.engine(worker)
    items = tuple(after if item is work else item for item in engine.work)
    world.set_engine(worker, engine._replace(free=free, work=items))
