"""What one side of a connection does to the other: messages arrive, bytes move, a side closes.

These are the only ways from one half of a pair into the other. A step queues them in `World.calls`; they are carried
out at its end, in order.
"""

from __future__ import annotations

from typing import Any

from tests.transfer.explorer.parts import DecodeEpoch, PrefillEpoch, Side
from tests.transfer.explorer.world import World


def receive(world: World, slot: int, what: str, number: int, value: Any) -> None:
    """One call from the other half."""
    epoch = next((epoch for epoch in world.half(slot).epochs if epoch.number == number), None)
    if epoch is None:
        return
    if what == "peer":
        _peer(world, slot, epoch, value)
    elif what == "message" and epoch.side is Side.UP:
        world.set_epoch(slot, epoch._replace(inbound=(*epoch.inbound, value)))
    elif what == "offer" and epoch.side:
        match(world, slot, epoch._replace(offers=(*epoch.offers, value)))
    elif what == "taken" and epoch.side:
        world.set_epoch(slot, epoch._replace(sends=_moved(epoch, value)))


def _peer(world: World, slot: int, epoch: PrefillEpoch | DecodeEpoch, side: Side) -> None:
    if isinstance(epoch, DecodeEpoch) and side is Side.GONE:
        epoch = epoch._replace(offers=())
    world.set_epoch(slot, epoch._replace(peer=side))


def match(world: World, slot: int, epoch: DecodeEpoch) -> None:
    """The oldest send meets the oldest receive, whatever numbers they bear: the transport does no better."""
    taken = 0
    while epoch.offers and any(job.tag is None for job in epoch.recvs):
        index = next(index for index, job in enumerate(epoch.recvs) if job.tag is None)
        met = epoch.recvs[index]._replace(tag=epoch.offers[0])
        epoch = epoch._replace(offers=epoch.offers[1:], recvs=(*epoch.recvs[:index], met, *epoch.recvs[index + 1 :]))
        taken += 1
    world.set_epoch(slot, epoch)
    if taken:
        world.tell_peer(slot, "taken", epoch.number, taken)


def _moved(epoch: PrefillEpoch, count: int) -> Any:
    waiting = [index for index, job in enumerate(epoch.sends) if not job.moved][:count]
    return tuple(job._replace(moved=True) if index in waiting else job for index, job in enumerate(epoch.sends))
