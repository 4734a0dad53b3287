"""Steps of one connection: messages arrive, staged bytes move, sides notice, close and dial."""

from __future__ import annotations

from typing import Any

from kv_transfer import events as ev
from tests.transfer.explorer.parts import (
    DecodeEngine,
    DecodeEpoch,
    DecodeHalf,
    Epoch,
    PrefillEpoch,
    PrefillHalf,
    SendJob,
    Side,
    Tag,
)
from tests.transfer.explorer.perform import feed
from tests.transfer.explorer.world import World, epoch_name


def epoch_of(world: World, worker: int, prefill: int, decode: int, number: int) -> tuple[int, Any, str, str]:
    """A worker's half of a pair: its slot, the epoch, the peer's name and the epoch's name."""
    model = world.model
    slot = model.half_slot(worker, prefill, decode)
    epoch = next(epoch for epoch in world.half(slot).epochs if epoch.number == number)
    peer = model.config.prefills + decode if model.is_prefill(worker) else prefill
    return slot, epoch, model.names[peer], epoch_name(model, prefill, decode, number)


def deliver(world: World, worker: int, p: int, d: int, number: int) -> None:
    slot, epoch, peer, name = epoch_of(world, worker, p, d, number)
    world.set_epoch(slot, epoch._replace(inbound=epoch.inbound[1:]))
    kind = ev.FromDecode if world.model.is_prefill(worker) else ev.FromPrefill
    feed(world, worker, kind(peer, name, epoch.inbound[0]))


def packed(world: World, worker: int, p: int, d: int, number: int) -> None:
    """The pack reads the attempt's blocks: `release_prefill` has made sure that they are still held."""
    slot, epoch, peer, name = epoch_of(world, worker, p, d, number)
    job, *rest = epoch.packs
    done = SendJob(job.seq, job.slot, Tag(job.key.request_id, job.lease, job.segment))
    world.set_epoch(slot, epoch._replace(packs=tuple(rest), packed=(*epoch.packed, done)))
    feed(world, worker, ev.Packed(peer, name, job.seq, ()))


def sent(world: World, worker: int, p: int, d: int, number: int) -> None:
    slot, epoch, peer, name = epoch_of(world, worker, p, d, number)
    world.set_epoch(slot, epoch._replace(sends=epoch.sends[1:]))
    feed(world, worker, ev.SendDone(peer, name, epoch.sends[0].seq))


def received(world: World, worker: int, p: int, d: int, number: int) -> None:
    slot, epoch, peer, name = epoch_of(world, worker, p, d, number)
    world.landed = epoch.recvs[0]
    world.set_epoch(slot, epoch._replace(recvs=epoch.recvs[1:]))
    feed(world, worker, ev.Received(peer, name, epoch.recvs[0].seq))
    world.landed = None


def unpacked(world: World, worker: int, p: int, d: int, number: int, intact: bool = True) -> None:
    slot, epoch, peer, name = epoch_of(world, worker, p, d, number)
    job, *rest = epoch.unpacks
    world.set_epoch(slot, epoch._replace(unpacks=tuple(rest)))
    ok = intact and (job.tag.lease, job.tag.segment) == (job.lease, job.segment)
    if ok:
        engine: DecodeEngine = world.engine(worker)
        contents = list(engine.contents)
        contents[job.block] = (job.tag.request, job.tag.segment.block_start)
        world.set_engine(worker, engine._replace(contents=tuple(contents)))
    feed(world, worker, ev.Unpacked(peer, name, job.seq, ok))


def notices(world: World, worker: int, p: int, d: int, number: int) -> None:
    _, _, peer, name = epoch_of(world, worker, p, d, number)
    feed(world, worker, ev.PeerLost(peer, name, ""))


def destroyed(world: World, worker: int, p: int, d: int, number: int) -> None:
    slot, epoch, peer, name = epoch_of(world, worker, p, d, number)
    vanish(world, slot, epoch)
    feed(world, worker, ev.EpochDestroyed(peer, name))


def vanish(world: World, slot: int, epoch: Epoch) -> None:
    """This side of the epoch is gone, with all that was in flight at it."""
    if isinstance(epoch, PrefillEpoch):
        world.set_epoch(slot, PrefillEpoch(epoch.number, Side.GONE, epoch.peer))
    else:
        world.set_epoch(slot, DecodeEpoch(epoch.number, Side.GONE, epoch.peer))
    world.tell_peer(slot, "peer", epoch.number, Side.GONE)


def connect(world: World, p: int, d: int) -> None:
    """Prefill dials. Decode may still hold the epoch before."""
    model = world.model
    slot = model.pair_slot(p, d)
    prefill, decode = world.half(slot), world.half(slot + 1)
    number = prefill.made + 1
    world.values[slot] = PrefillHalf(number, (*prefill.epochs, PrefillEpoch(number)))
    world.values[slot + 1] = DecodeHalf((*decode.epochs, DecodeEpoch(number)))
    name, other = epoch_name(model, p, d, number), model.config.prefills + d
    feed(world, other, ev.PeerConnected(model.names[p], name, model.config.window))
    feed(world, p, ev.PeerConnected(model.names[other], name, model.config.window))
