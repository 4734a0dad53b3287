"""Executes the actions of a protocol step in the model: engines, channels, staging. Raises Violation if it must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kv_transfer import events as ev
from kv_transfer.messages import Committed, LeaseKey
from tests.transfer.explorer.parts import (
    Content,
    DecodeEngine,
    Epoch,
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
    world.values[slot], actions = world.model.step(worker, world.values[slot], event)
    for action in actions:
        PERFORM[type(action)](world, worker, action)


def locate(world: World, worker: int, peer: str, epoch: str) -> tuple[int, int, Epoch | None]:
    """The pair, and the epoch if this worker's side of it still exists."""
    model = world.model
    mine, other = worker, model.workers[peer]
    prefill, decode = (mine, other) if model.is_prefill(worker) else (other, mine)
    decode -= model.config.prefills
    for candidate in world.pair(prefill, decode).epochs:
        if epoch_name(model, prefill, decode, candidate.number) == epoch:
            side = candidate.prefill if model.is_prefill(worker) else candidate.decode
            return prefill, decode, candidate if side else None
    return prefill, decode, None


def must_locate(world: World, worker: int, action: Any) -> tuple[int, int, Epoch]:
    prefill, decode, epoch = locate(world, worker, action.peer, action.epoch)
    if epoch is None:
        raise Violation(f"I1: {type(action).__name__} names epoch {action.epoch}, which is destroyed")
    return prefill, decode, epoch


def send_message(world: World, worker: int, action: Any) -> None:
    prefill, decode, epoch = locate(world, worker, action.peer, action.epoch)
    if isinstance(action.message, Committed) and action.message.lease not in world.engine(worker).admitted:
        raise Violation(f"I5: {action.message.lease} is acknowledged without having been admitted")
    if epoch is None or epoch.prefill is not Side.UP or epoch.decode is not Side.UP:
        return
    if world.model.is_prefill(worker):
        epoch = epoch._replace(to_decode=(*epoch.to_decode, action.message))
    else:
        epoch = epoch._replace(to_prefill=(*epoch.to_prefill, action.message))
    world.set_epoch(prefill, decode, epoch)


def destroy_epoch(world: World, worker: int, action: ev.DestroyEpoch) -> None:
    prefill, decode, epoch = must_locate(world, worker, action)
    side = epoch.prefill if world.model.is_prefill(worker) else epoch.decode
    if side is not Side.UP:
        raise Violation(f"epoch {action.epoch} is destroyed twice")
    if world.model.is_prefill(worker):
        epoch = epoch._replace(prefill=Side.CLOSING, to_prefill=())
    else:
        epoch = epoch._replace(decode=Side.CLOSING, to_decode=())
    world.set_epoch(prefill, decode, epoch)


def report_failed(world: World, worker: int, action: ev.ReportFailed | ev.ReportRefused) -> None:
    engine = world.engine(worker)
    if action.key in engine.reported:
        raise Violation(f"I2: a second terminal report of {action.key} by {world.model.names[worker]}")
    if isinstance(engine, PrefillEngine) and action.key in engine.released:
        raise Violation(f"I2: {action.key} is reported failed after its end")
    world.set_engine(worker, engine._replace(reported=tuple(sorted((*engine.reported, action.key)))))
    world.calls.append(("failed", worker, action.key))


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
    for epoch in world.pair(worker, world.model.spec(action.key).decode).epochs:
        if any(job.key == action.key for job in epoch.packs):
            raise Violation(f"I1: blocks of {action.key} are released while a pack reads them")
    if held.computing:
        raise Violation(f"I1: blocks of {action.key} are released while the engine writes them")
    free = engine.free + (world.model.spec(action.key).num_blocks if held.holds else 0)
    work = tuple(item for item in engine.work if item is not held)
    released = tuple(sorted((*engine.released, action.key)))
    world.set_engine(worker, engine._replace(free=free, work=work, released=released))


def pack(world: World, worker: int, action: ev.Pack) -> None:
    prefill, decode, epoch = must_locate(world, worker, action)
    for other in world.pair(prefill, decode).epochs:
        busy = [job.slot for jobs in (other.packs, other.packed, other.sends) for job in jobs]
        if action.slot in busy:
            raise Violation(f"I1: send slot {action.slot} is packed into while it is in use")
    job = PackJob(action.seq, action.slot, action.key, action.lease, action.segment)
    world.set_epoch(prefill, decode, epoch._replace(packs=(*epoch.packs, job)))


def start_send(world: World, worker: int, action: ev.StartSend) -> None:
    prefill, decode, epoch = must_locate(world, worker, action)
    job = next((job for job in epoch.packed if job.seq == action.seq and job.slot == action.slot), None)
    if job is None or action.seq != epoch.next_send:
        raise Violation(f"send of {action.seq} from slot {action.slot}, which does not hold the next chunk")
    packed = tuple(other for other in epoch.packed if other is not job)
    epoch = epoch._replace(packed=packed, sends=(*epoch.sends, job), next_send=action.seq + 1)
    world.set_epoch(prefill, decode, match(epoch))


def match(epoch: Epoch) -> Epoch:
    """The oldest unmatched send meets the oldest unmatched receive, whatever numbers they bear: NCCL does no better."""
    send = next((job for job in epoch.sends if not job.moved), None)
    recv = next((job for job in epoch.recvs if job.tag is None), None)
    if send is None or recv is None or not epoch.prefill or not epoch.decode:
        return epoch
    sends = tuple(job._replace(moved=True) if job is send else job for job in epoch.sends)
    recvs = tuple(job._replace(tag=send.tag) if job is recv else job for job in epoch.recvs)
    return match(epoch._replace(sends=sends, recvs=recvs))


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
    world.calls.append(("reserved", action.key, action.lease, action.first_block))


def start_recv(world: World, worker: int, action: ev.StartRecv) -> None:
    prefill, decode, epoch = must_locate(world, worker, action)
    for other in world.pair(prefill, decode).epochs:
        busy = [job.slot for jobs in (other.recvs, other.unpacks) for job in jobs]
        if action.slot in busy:
            raise Violation(f"I1: receive slot {action.slot} is received into while it is in use")
    if action.seq != epoch.next_recv:
        raise Violation(f"receive of {action.seq} is launched, {epoch.next_recv} is next")
    recvs = (*epoch.recvs, RecvJob(action.seq, action.slot))
    world.set_epoch(prefill, decode, match(epoch._replace(recvs=recvs, next_recv=action.seq + 1)))


def unpack(world: World, worker: int, action: ev.Unpack) -> None:
    """What arrived is `world.landed` for as long as the protocol handles Received."""
    prefill, decode, epoch = must_locate(world, worker, action)
    arrived = world.landed
    if arrived is None or arrived.tag is None or (arrived.seq, arrived.slot) != (action.seq, action.slot):
        raise Violation(f"unpack of chunk {action.seq} from slot {action.slot}, which has not received it")
    lease = _reserved(world, worker, action.lease)
    index = action.segment.block_start - lease.first_block
    if not 0 <= index < len(lease.blocks):
        raise Violation(f"I1: unpack of {action.segment} outside of its lease")
    job = UnpackJob(action.seq, action.slot, action.lease, action.segment, lease.blocks[index], arrived.tag)
    world.set_epoch(prefill, decode, epoch._replace(unpacks=(*epoch.unpacks, job)))


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
            admitted=tuple(sorted((*engine.admitted, action.lease))),
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
    for epoch in world.pair(spec.prefill, spec.decode).epochs:
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
