"""Steps of one connection: messages arrive, staged bytes move, sides notice, close and dial."""

from __future__ import annotations

from kv_transfer import events as ev
from tests.transfer.explorer.parts import DecodeEngine, Epoch, SendJob, Side, Tag
from tests.transfer.explorer.perform import feed
from tests.transfer.explorer.world import World, epoch_name


def prefill_gone(epoch: Epoch) -> Epoch:
    return epoch._replace(prefill=Side.GONE, to_prefill=(), packs=(), packed=(), sends=(), next_send=0)


def decode_gone(epoch: Epoch) -> Epoch:
    return epoch._replace(decode=Side.GONE, to_decode=(), recvs=(), unpacks=(), next_recv=0)


def epoch_of(world: World, prefill: int, decode: int, number: int) -> tuple[Epoch, int, int, str, str, str]:
    """The epoch, the two worker numbers, their names and the epoch's name."""
    model = world.model
    other = model.config.prefills + decode
    epoch = next(epoch for epoch in world.pair(prefill, decode).epochs if epoch.number == number)
    name = epoch_name(model, prefill, decode, number)
    return epoch, prefill, other, model.names[prefill], model.names[other], name


def to_prefill(world: World, p: int, d: int, number: int) -> None:
    epoch, worker, _, _, peer, name = epoch_of(world, p, d, number)
    world.set_epoch(p, d, epoch._replace(to_prefill=epoch.to_prefill[1:]))
    feed(world, worker, ev.FromDecode(peer, name, epoch.to_prefill[0]))


def to_decode(world: World, p: int, d: int, number: int) -> None:
    epoch, _, worker, peer, _, name = epoch_of(world, p, d, number)
    world.set_epoch(p, d, epoch._replace(to_decode=epoch.to_decode[1:]))
    feed(world, worker, ev.FromPrefill(peer, name, epoch.to_decode[0]))


def packed(world: World, p: int, d: int, number: int) -> None:
    """The pack reads the attempt's blocks: `release_prefill` has made sure that they are still held."""
    epoch, worker, _, _, peer, name = epoch_of(world, p, d, number)
    job, *rest = epoch.packs
    done = SendJob(job.seq, job.slot, Tag(job.key.request_id, job.lease, job.segment))
    world.set_epoch(p, d, epoch._replace(packs=tuple(rest), packed=(*epoch.packed, done)))
    feed(world, worker, ev.Packed(peer, name, job.seq, ()))


def sent(world: World, p: int, d: int, number: int) -> None:
    epoch, worker, _, _, peer, name = epoch_of(world, p, d, number)
    world.set_epoch(p, d, epoch._replace(sends=epoch.sends[1:]))
    feed(world, worker, ev.SendDone(peer, name, epoch.sends[0].seq))


def received(world: World, p: int, d: int, number: int) -> None:
    epoch, _, worker, peer, _, name = epoch_of(world, p, d, number)
    world.landed = epoch.recvs[0]
    world.set_epoch(p, d, epoch._replace(recvs=epoch.recvs[1:]))
    feed(world, worker, ev.Received(peer, name, epoch.recvs[0].seq))
    world.landed = None
    if not world.model.config.fine and epoch.prefill is Side.UP:
        sent(world, p, d, number)


def unpacked(world: World, p: int, d: int, number: int, intact: bool = True) -> None:
    epoch, _, worker, peer, _, name = epoch_of(world, p, d, number)
    job, *rest = epoch.unpacks
    world.set_epoch(p, d, epoch._replace(unpacks=tuple(rest)))
    ok = intact and (job.tag.lease, job.tag.segment) == (job.lease, job.segment)
    if ok:
        engine: DecodeEngine = world.engine(worker)
        contents = list(engine.contents)
        contents[job.block] = (job.tag.request, job.tag.segment.block_start)
        world.set_engine(worker, engine._replace(contents=tuple(contents)))
    feed(world, worker, ev.Unpacked(peer, name, job.seq, ok))


def prefill_loses(world: World, p: int, d: int, number: int) -> None:
    _, worker, _, _, peer, name = epoch_of(world, p, d, number)
    feed(world, worker, ev.PeerLost(peer, name, ""))


def decode_loses(world: World, p: int, d: int, number: int) -> None:
    _, _, worker, peer, _, name = epoch_of(world, p, d, number)
    feed(world, worker, ev.PeerLost(peer, name, ""))


def prefill_destroyed(world: World, p: int, d: int, number: int) -> None:
    epoch, worker, _, _, peer, name = epoch_of(world, p, d, number)
    world.set_epoch(p, d, prefill_gone(epoch))
    feed(world, worker, ev.EpochDestroyed(peer, name))


def decode_destroyed(world: World, p: int, d: int, number: int) -> None:
    epoch, _, worker, peer, _, name = epoch_of(world, p, d, number)
    world.set_epoch(p, d, decode_gone(epoch))
    feed(world, worker, ev.EpochDestroyed(peer, name))


def connect(world: World, p: int, d: int) -> None:
    """Prefill dials. Decode may still hold the epoch before."""
    model = world.model
    pair = world.pair(p, d)
    number = pair.made + 1
    world.values[model.pair_slot(p, d)] = pair._replace(made=number, epochs=(*pair.epochs, Epoch(number)))
    name, other = epoch_name(model, p, d, number), model.config.prefills + d
    feed(world, other, ev.PeerConnected(model.names[p], name, model.config.window))
    feed(world, p, ev.PeerConnected(model.names[other], name, model.config.window))
