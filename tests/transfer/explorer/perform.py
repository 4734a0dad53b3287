"""Executes the actions of a protocol step in the model: engines, channels, staging. Raises Violation if it must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kv_transfer import events as ev
from kv_transfer.messages import Committed, LeaseKey
from tests.transfer.explorer import halves
from tests.transfer.explorer.parts import (
    Content,
    DecodeEngine,
    PackJob,
    PrefillEngine,
    PrefillWork,
    RecvJob,
    Reserved,
    Running,
    Side,
    UnpackJob,
    Violation,
)
from tests.transfer.explorer.world import PROTO, World, epoch_name


def feed(world: World, worker: int, event: ev.PrefillEvent | ev.DecodeEvent) -> None:
    """One protocol step at a worker, and all that it asks for."""
    slot = world.model.slot(worker, PROTO)
    before = world.values[slot]
    world.values[slot], actions = world.model.step(worker, before, event)
    world.idle = world.idle and not actions and world.values[slot] == before
    for action in actions:
        PERFORM[type(action)](world, worker, action)


def locate(world: World, worker: int, action: Any) -> tuple[int, Any]:
    """The worker's half of the pair, and the epoch if this side of it still exists."""
    model = world.model
    other = model.workers[action.peer]
    prefill, decode = (worker, other) if model.is_prefill(worker) else (other, worker)
    decode -= model.config.prefills
    slot = model.half_slot(worker, prefill, decode)
    for candidate in world.half(slot).epochs:
        if candidate.side and epoch_name(model, prefill, decode, candidate.number) == action.epoch:
            return slot, candidate
    return slot, None


def must_locate(world: World, worker: int, action: Any) -> tuple[int, Any]:
    slot, epoch = locate(world, worker, action)
    if epoch is None:
        raise Violation(f"I1: {type(action).__name__} names epoch {action.epoch}, which is destroyed")
    return slot, epoch


def send_message(world: World, worker: int, action: ev.SendMessage) -> None:
    slot, epoch = locate(world, worker, action)
    if isinstance(action.message, Committed):
        admitted = [name for _, name in world.engine(worker).admitted]
        if action.message.lease not in admitted:
            raise Violation(f"I5: {action.message.lease} is acknowledged without having been admitted")
    if epoch is not None and epoch.side is Side.UP:
        world.tell_peer(slot, "message", epoch.number, action.message)


def destroy_epoch(world: World, worker: int, action: ev.DestroyEpoch) -> None:
    slot, epoch = must_locate(world, worker, action)
    if epoch.side is not Side.UP:
        raise Violation(f"epoch {action.epoch} is destroyed twice")
    world.set_epoch(slot, epoch._replace(side=Side.CLOSING, inbound=()))
    world.tell_peer(slot, "peer", epoch.number, Side.CLOSING)


def report_failed(world: World, worker: int, action: ev.ReportFailed | ev.ReportRefused) -> None:
    engine = world.engine(worker)
    if action.key in engine.reported:
        raise Violation(f"I2: a second terminal report of {action.key} by {world.model.names[worker]}")
    if isinstance(engine, PrefillEngine) and action.key in engine.released:
        raise Violation(f"I2: {action.key} is reported failed after its end")
    world.set_engine(worker, engine._replace(reported=tuple(sorted((*engine.reported, action.key)))))
    world.tell_router("failed", action.key, worker)


# ---- prefill


def start_prefill(world: World, worker: int, action: ev.StartPrefill) -> None:
    engine: PrefillEngine = world.engine(worker)
    if any(work.key == action.key for work in engine.work):
        raise Violation(f"{action.key} is started twice")
    work = (*engine.work, PrefillWork(action.key, world.opening))
    world.set_engine(worker, engine._replace(work=tuple(sorted(work))))


def abort_prefill(world: World, worker: int, action: ev.AbortPrefill) -> None:
    engine: PrefillEngine = world.engine(worker)
    work = tuple(item._replace(computing=False) if item.key == action.key else item for item in engine.work)
    world.set_engine(worker, engine._replace(work=work))


def release_prefill(world: World, worker: int, action: ev.ReleasePrefill) -> None:
    engine: PrefillEngine = world.engine(worker)
    held = next((work for work in engine.work if work.key == action.key), None)
    if held is None:
        raise Violation(f"I4: blocks of {action.key} are released twice")
    spec = world.model.spec(action.key)
    for epoch in world.half(world.model.half_slot(worker, spec.prefill, spec.decode)).epochs:
        if any(job.key == action.key for job in epoch.packs):
            raise Violation(f"I1: blocks of {action.key} are released while a pack reads them")
    if held.computing:
        raise Violation(f"I1: blocks of {action.key} are released while the engine writes them")
    free = engine.free + (spec.num_blocks if held.holds else 0)
    work = tuple(item for item in engine.work if item is not held)
    released = tuple(sorted((*engine.released, action.key)))
    world.set_engine(worker, engine._replace(free=free, work=work, released=released))


def pack(world: World, worker: int, action: ev.Pack) -> None:
    slot, epoch = must_locate(world, worker, action)
    for other in world.half(slot).epochs:
        busy = [job.slot for jobs in (other.packs, other.packed, other.sends) for job in jobs]
        if action.slot in busy:
            raise Violation(f"I1: send slot {action.slot} is packed into while it is in use")
    job = PackJob(action.seq, action.slot, action.key, action.lease, action.segment)
    world.set_epoch(slot, epoch._replace(packs=(*epoch.packs, job)))


def start_send(world: World, worker: int, action: ev.StartSend) -> None:
    slot, epoch = must_locate(world, worker, action)
    job = next((job for job in epoch.packed if job.seq == action.seq and job.slot == action.slot), None)
    if job is None or action.seq != epoch.next_send:
        raise Violation(f"send of {action.seq} from slot {action.slot}, which does not hold the next chunk")
    packed = tuple(other for other in epoch.packed if other is not job)
    world.set_epoch(slot, epoch._replace(packed=packed, sends=(*epoch.sends, job), next_send=action.seq + 1))
    world.tell_peer(slot, "offer", epoch.number, job.tag)


# ---- decode


def reserve_blocks(world: World, worker: int, action: ev.ReserveBlocks) -> None:
    engine: DecodeEngine = world.engine(worker)
    spec = world.model.spec(action.key)
    reply: ev.DecodeEvent
    if len(engine.free) < spec.chunks:
        reply = ev.BlocksRefused(action.lease, "busy", "no room")
    else:
        blocks, free, stamp = engine.free[: spec.chunks], engine.free[spec.chunks :], engine.stamp + 1
        lease = Reserved(action.lease, stamp, action.key, world.opening, spec.cached, blocks)
        engine = engine._replace(stamp=stamp, free=free, reserved=(*engine.reserved, lease))
        reply = ev.BlocksReserved(action.lease, stamp, spec.cached, spec.num_blocks)
    if world.model.config.fine:
        world.set_engine(
            worker,
            engine._replace(replies=tuple(sorted((*engine.replies, (action.key, reply)), key=lambda reply: reply[0]))),
        )
    else:
        world.set_engine(worker, engine)
        feed(world, worker, reply)


def report_reserved(world: World, worker: int, action: ev.ReportReserved) -> None:
    if action.key in world.engine(worker).reported:
        raise Violation(f"I2: {action.key} is reported reserved after its end")
    world.tell_router("reserved", action.key, action.lease, action.first_block)


def start_recv(world: World, worker: int, action: ev.StartRecv) -> None:
    slot, epoch = must_locate(world, worker, action)
    for other in world.half(slot).epochs:
        busy = [job.slot for jobs in (other.recvs, other.unpacks) for job in jobs]
        if action.slot in busy:
            raise Violation(f"I1: receive slot {action.slot} is received into while it is in use")
    if action.seq != epoch.next_recv:
        raise Violation(f"receive of {action.seq} is launched, {epoch.next_recv} is next")
    recvs = (*epoch.recvs, RecvJob(action.seq, action.slot))
    halves.match(world, slot, epoch._replace(recvs=recvs, next_recv=action.seq + 1))


def unpack(world: World, worker: int, action: ev.Unpack) -> None:
    """What arrived is `world.landed` for as long as the protocol handles Received."""
    slot, epoch = must_locate(world, worker, action)
    arrived = world.landed
    if arrived is None or arrived.tag is None or (arrived.seq, arrived.slot) != (action.seq, action.slot):
        raise Violation(f"unpack of chunk {action.seq} from slot {action.slot}, which has not received it")
    lease = _reserved(world, worker, action.lease)
    index = action.segment.block_start - lease.first_block
    if not 0 <= index < len(lease.blocks):
        raise Violation(f"I1: unpack of {action.segment} outside of its lease")
    job = UnpackJob(action.seq, action.slot, action.lease, action.segment, lease.blocks[index], arrived.tag)
    world.set_epoch(slot, epoch._replace(unpacks=(*epoch.unpacks, job)))


def _reserved(world: World, worker: int, name: LeaseKey) -> Reserved:
    for lease in world.engine(worker).reserved:
        if lease.lease == name.lease:
            return lease  # type: ignore[no-any-return]
    raise Violation(f"I4: the engine holds nothing for {name}")


def admit(world: World, worker: int, action: ev.Admit) -> None:
    lease = _reserved(world, worker, action.lease)
    engine: DecodeEngine = world.engine(worker)
    for index, block in enumerate(lease.blocks):
        want = (action.key.request_id, lease.first_block + index)
        if engine.contents[block] != want:
            raise Violation(f"I5: {action.key} is admitted with {engine.contents[block]} where {want} should be")
    if action.key in engine.reported:
        raise Violation(f"I2: {action.key} is admitted after its end")
    _check_no_unpack(world, worker, lease, "admitted")
    running = (*engine.running, Running(action.key, lease.base + 1, lease.blocks))
    world.set_engine(
        worker,
        engine._replace(
            contents=forget(engine, lease.blocks),
            reserved=tuple(other for other in engine.reserved if other is not lease),
            running=tuple(sorted(running)),
            reported=tuple(sorted((*engine.reported, action.key))),
            admitted=tuple(sorted((*engine.admitted, (action.key, action.lease)))),
        ),
    )


def release_lease(world: World, worker: int, action: ev.ReleaseLease) -> None:
    lease = _reserved(world, worker, action.lease)
    if lease.generation != action.lease.generation:
        raise Violation(f"I1: {action.lease} is released, {lease.generation} is held")
    _check_no_unpack(world, worker, lease, "released")
    engine: DecodeEngine = world.engine(worker)
    reserved = tuple(other for other in engine.reserved if other is not lease)
    free = tuple(sorted((*engine.free, *lease.blocks)))
    contents = forget(engine, lease.blocks)
    world.set_engine(worker, engine._replace(free=free, contents=contents, reserved=reserved))


def forget(engine: DecodeEngine, blocks: tuple[int, ...]) -> tuple[Content, ...]:
    """What blocks hold stops to matter when they are admitted or freed: new owners find NaN."""
    return tuple(None if block in blocks else content for block, content in enumerate(engine.contents))


def _check_no_unpack(world: World, worker: int, lease: Reserved, what: str) -> None:
    spec = world.model.spec(lease.key)
    for epoch in world.half(world.model.half_slot(worker, spec.prefill, spec.decode)).epochs:
        if any(job.block in lease.blocks for job in epoch.unpacks):
            raise Violation(f"I1: blocks of {lease.key} are {what} while an unpack writes to them")


PERFORM: dict[type, Callable[[World, int, Any], None]] = {
    ev.SendMessage: send_message,
    ev.DestroyEpoch: destroy_epoch,
    ev.ReportFailed: report_failed,
    ev.ReportRefused: report_failed,
    ev.StartPrefill: start_prefill,
    ev.AbortPrefill: abort_prefill,
    ev.ReleasePrefill: release_prefill,
    ev.Pack: pack,
    ev.StartSend: start_send,
    ev.ReserveBlocks: reserve_blocks,
    ev.ReportReserved: report_reserved,
    ev.StartRecv: start_recv,
    ev.Unpack: unpack,
    ev.Admit: admit,
    ev.ReleaseLease: release_lease,
}
