"""What both ends of the hand-over protocol do alike: connect, watch, lose and forget a connection, and let time pass.

Pure, as the ends are. A step of either end is a `Turn`: handlers read and replace what it knows and append actions.
The rules here carry invariants I1 to I3 for both ends: what a lost epoch may still touch stays quarantined and pinned
until it is destroyed, every holder of blocks ends with its connection or at its deadline, and a connection on which
nothing moves is torn down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from kv_transfer.frozen_map import FrozenMap, FrozenTable
from kv_transfer.link_events import (
    AttemptKey,
    CommonAction,
    DestroyEpoch,
    EpochDestroyed,
    PeerConnected,
    PeerLost,
    ReportFailed,
    SendMessage,
)
from kv_transfer.link_state import ENDED_REMEMBERED, NO_LINK, AnyFlight, Holder, Link
from kv_transfer.messages import DecodeMessage, PrefillMessage

P = TypeVar("P")  # see link_state
F = TypeVar("F", bound=AnyFlight[Any])
H = TypeVar("H", bound=Holder)
A = TypeVar("A")
M = TypeVar("M", bound=PrefillMessage | DecodeMessage)


class Turn(ABC, Generic[P, F, H, A, M]):
    """One step of one end in the making. Lives as long as the step; every value that it holds is immutable."""

    __slots__ = ("actions", "aliases", "ended", "holders", "links", "now", "stall_timeout")

    stall_timeout: float
    now: float
    links: FrozenMap[str, Link[F, P]]
    holders: FrozenTable[P, H]
    aliases: FrozenTable[Hashable, P]
    ended: tuple[AttemptKey, ...]
    actions: list[A | CommonAction]

    @abstractmethod
    def fail(self, holder: H, code: str, reason: str) -> None:
        """End a live holder that nobody else has ended: tell the router, and the peer if it is connected."""

    @abstractmethod
    def settle(self, name: P) -> None:
        """Give an ended holder's blocks back if nothing touches them any more."""

    def act(self, action: A | CommonAction) -> None:
        self.actions.append(action)

    def tell(self, peer: str, message: M) -> None:
        """Say it to the peer if it is connected."""
        epoch = self.link(peer).epoch
        if epoch is not None:
            self.actions.append(SendMessage(peer, epoch, message))

    def report(self, key: AttemptKey, code: str, reason: str) -> None:
        self.actions.append(ReportFailed(key, code, reason))

    def link(self, peer: str) -> Link[F, P]:
        return self.links.get(peer) or NO_LINK

    def put_link(self, peer: str, link: Link[F, P]) -> None:
        """A link that is of no use is forgotten."""
        self.links = self.links.set(peer, link) if link.is_useful else self.links.discard(peer)

    def begin(self, name: P, holder: H) -> None:
        self.holders = self.holders.set(name, holder)
        self.aliases = self.aliases.set(holder.alias, name)

    def put(self, name: P, holder: H) -> None:
        self.holders = self.holders.set(name, holder)

    def forget(self, name: P, holder: H) -> None:
        """It holds nothing any more, and a repeat of its command will be recognised."""
        self.holders = self.holders.discard(name)
        if self.aliases.get(holder.alias) == name:  # a younger one may go by it
            self.aliases = self.aliases.discard(holder.alias)
        self.ended = (*self.ended, holder.key)[-ENDED_REMEMBERED:]

    def find(self, alias: Hashable) -> H | None:
        """The holder that goes by this alias."""
        name = self.aliases.get(alias)
        return None if name is None else self.holders[name]


AnyTurn = Turn[Any, Any, Any, Any, Any]


# ---- time


def on_tick(turn: AnyTurn, now: float) -> None:
    turn.now = max(now, turn.now)
    due = [holder for holder in turn.holders.values() if not holder.is_over and holder.deadline <= turn.now]
    for holder in sorted(due, key=lambda holder: (holder.deadline, holder.key)):
        turn.fail(holder, "expired", "the deadline passed during the hand-over")
    for peer in sorted(turn.links):
        watch_progress(turn, peer)


def watch_progress(turn: AnyTurn, peer: str) -> None:
    """Tear the epoch down when a chunk is outstanding and nothing has moved for `stall_timeout`."""
    link = turn.link(peer)
    if link.epoch is None or not link.is_outstanding:
        return
    if link.stall_at is None:
        turn.put_link(peer, link._replace(stall_at=turn.now + turn.stall_timeout))
    elif link.stall_at <= turn.now:
        lose(turn, peer, "stalled: no chunk moved")


# ---- epochs


def on_connected(turn: AnyTurn, event: PeerConnected) -> None:
    link = turn.link(event.peer)
    if link.epoch == event.epoch or link.slots.is_dying(event.epoch):
        return
    if link.epoch is not None:
        lose(turn, event.peer, f"replaced by epoch {event.epoch}")
    slots = turn.link(event.peer).slots.open_epoch(event.window)
    turn.put_link(event.peer, Link(epoch=event.epoch, slots=slots))


def on_lost(turn: AnyTurn, event: PeerLost) -> None:
    if turn.link(event.peer).epoch == event.epoch:
        lose(turn, event.peer, event.reason)


def on_destroyed(turn: AnyTurn, event: EpochDestroyed) -> None:
    """Nothing of the epoch can touch slots or blocks any more. The caller goes on with what waits for slots."""
    link = turn.link(event.peer)
    turn.put_link(event.peer, link._replace(slots=link.slots.destroyed(event.epoch)))
    for name in link.slots.pins(event.epoch):
        turn.settle(name)


def lose(turn: AnyTurn, peer: str, reason: str) -> None:
    """Tear the live epoch down: its slots are quarantined, its holders fail, copies in flight pin their blocks."""
    link = turn.link(peer)
    if link.epoch is None:
        return
    turn.act(DestroyEpoch(peer, link.epoch, reason))
    pins = tuple(dict.fromkeys(flight.pin for flight in link.flights if flight.pin is not None))
    slots = link.slots.lose_epoch(link.epoch, tuple(f.slot for f in link.flights if f.slot >= 0), pins)
    turn.put_link(peer, Link(slots=slots))
    orphans = [holder for holder in turn.holders.values() if holder.peer == peer and not holder.is_over]
    for holder in sorted(orphans, key=lambda holder: holder.key):
        turn.fail(holder, "peer_lost", reason)
