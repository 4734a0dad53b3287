"""What both ends of the hand-over protocol know of a connection, and what can be asked of either end's state.

Immutable values only. Times are seconds of the worker's monotonic clock as events carried them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from kv_transfer.frozen_map import FrozenMap, FrozenTable
from kv_transfer.link_events import AttemptKey
from kv_transfer.slots import SlotPool

STALL_TIMEOUT_S = 10.0  # no progress of an outstanding chunk for this long tears the epoch down (invariant I4)
ENDED_REMEMBERED = 256  # ended attempts whose repeated command is recognised

P = TypeVar("P")  # names a holder: an attempt by its key at prefill, a lease by its number at decode
P_co = TypeVar("P_co", covariant=True)
F = TypeVar("F", bound="AnyFlight[Any]")


class AnyFlight(Protocol[P_co]):
    """A chunk under way at one end."""

    @property
    def slot(self) -> int:
        """The staging slot that it holds, or -1."""

    @property
    def pin(self) -> P_co | None:
        """Whose KV blocks a copy from or to the slot may touch now."""


class Holder(Protocol):
    """Whatever holds KV blocks for a hand-over: an attempt at prefill, a lease at decode."""

    @property
    def key(self) -> AttemptKey: ...
    @property
    def peer(self) -> str: ...
    @property
    def deadline(self) -> float: ...
    @property
    def alias(self) -> Hashable:
        """Under what others ask for it."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended and only waits until nothing touches its blocks."""


class Link(NamedTuple, Generic[F, P]):
    """The connection to one peer: chunks [done_through, next_seq) are announced and their credits not yet returned.

    `flights` are in order of seq. `stall_at`: when the epoch is torn down unless something moves.
    """

    epoch: str | None = None
    slots: SlotPool[P] = SlotPool()
    next_seq: int = 0
    done_through: int = 0
    flights: tuple[F, ...] = ()
    stall_at: float | None = None

    @property
    def is_useful(self) -> bool:
        """Connected, or waiting for an EpochDestroyed."""
        return self.epoch is not None or bool(self.slots.dying)

    @property
    def is_outstanding(self) -> bool:
        """Whether anything should move."""
        return self.next_seq > self.done_through or bool(self.flights)


NO_LINK: Link[Any, Any] = Link()


class State(Protocol):
    """The part of either end's state that both have.

    `aliases`: the names of holders by their aliases. `ended`: the latest attempts that are over, so that repeats of
    their commands are no-ops.
    """

    @property
    def stall_timeout(self) -> float: ...
    @property
    def now(self) -> float: ...
    @property
    def links(self) -> FrozenMap[str, Link[Any, Any]]: ...
    @property
    def holders(self) -> FrozenTable[Any, Any]: ...
    @property
    def aliases(self) -> FrozenTable[Any, Any]: ...
    @property
    def ended(self) -> tuple[AttemptKey, ...]: ...


class Counters(NamedTuple):
    """For metrics. `live`: leases or attempts that still hold blocks; the others count staging slots."""

    live: int
    slots_in_flight: int
    slots_quarantined: int


def counters(state: State) -> Counters:
    """Live leases or attempts, staging slots in flight, staging slots in quarantine."""
    links = state.links.values()
    in_flight = sum(flight.slot >= 0 for link in links for flight in link.flights)
    return Counters(len(state.holders), in_flight, sum(link.slots.num_quarantined for link in links))


def next_deadline(state: State) -> float | None:
    """When the next Tick is due at the latest, in the clock of the events; None while nothing waits."""
    latest = state.now + state.stall_timeout
    times = [holder.deadline for holder in state.holders.values() if not holder.is_over]
    times += [link.stall_at or latest for link in state.links.values() if link.epoch and link.is_outstanding]
    return min(times, default=None)
