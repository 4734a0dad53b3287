"""Checks that the protocol keeps connections apart: every step is repeated in the company of a stranger's connection.

The stranger's link is busy or dying, and it uses the same sequence numbers, slots and, at prefill, names of leases. The
step must do the same as without it and leave it as it is. With that, worlds may come apart (slices.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from kv_transfer.decode_state import DecodeState, Lease, LeasePhase, RecvFlight, RecvLink, RecvStage
from kv_transfer.events import AttemptKey
from kv_transfer.link_state import Link
from kv_transfer.messages import Chunk, LeaseKey, Segment
from kv_transfer.prefill_state import Attempt, Flight, Phase, PrefillState, Queued, SendLink, Stage
from kv_transfer.slots import SlotPool
from tests.transfer.explorer.checks import require

STRANGER = "P9"
FAR = 1e9  # no deadline of the stranger ever falls due
NUMBER = 9000  # of its leases at decode, where the worker itself numbers them
SEGMENT = Segment(0, 1, 0, 1)

State = PrefillState | DecodeState
Step = Callable[[Any, Any], tuple[Any, tuple[Any, ...]]]


def check_company(step: Step, state: State, event: Any, after: State, actions: tuple[Any, ...]) -> None:
    for join in companies(state):
        joined, said = step(join(state), event)
        require(joined == join(after), f"{type(event).__name__} touches another link")
        require(said == actions, f"{type(event).__name__} depends on another link")


def companies(state: State) -> Iterator[Callable[[Any], Any]]:
    """Ways of adding a stranger's connection, the same to a state and to its successor."""
    if isinstance(state, PrefillState):
        names = [attempt.lease for attempt in state.attempts.values()] or [LeaseKey(1, 1)]
        yield lambda other: _with_prefill(other, BUSY_SENDER, names, Phase.STREAMING)
        yield lambda other: _with_prefill(other, DYING_SENDER, names, Phase.DRAINING)
    else:
        yield lambda other: _with_decode(other, BUSY_RECEIVER, LeasePhase.RESERVED)
        yield lambda other: _with_decode(other, DYING_RECEIVER, LeasePhase.DRAINING)


@cache
def _key(number: int) -> AttemptKey:
    return AttemptKey("stranger", number)


@cache
def _attempt(number: int, name: LeaseKey, phase: Phase, queues: bool = False) -> Attempt:
    if queues:
        return Attempt(_key(number), STRANGER, name, FAR, phase, num_chunks=3, queue=(QUEUED,))
    return Attempt(_key(number), STRANGER, name, FAR, phase)


@cache
def _lease(phase: LeasePhase) -> Lease:
    return Lease(NUMBER, _key(0), STRANGER, 1, FAR, phase, name=LeaseKey(NUMBER, 1), num_blocks=1)


def _with_prefill(state: PrefillState, link: SendLink, names: list[LeaseKey], phase: Phase) -> PrefillState:
    attempts, aliases, waiting = state.attempts, state.aliases, state.waiting
    queues = phase is Phase.STREAMING
    for number, name in enumerate(names):
        attempts = attempts.set(_key(number), _attempt(number, name, phase, queues and number == 0))
        aliases = aliases.set((STRANGER, name), _key(number))
    if queues:
        waiting = waiting.set(STRANGER, (_key(0),))
    links = state.links.set(STRANGER, link)
    return state._replace(links=links, attempts=attempts, aliases=aliases, waiting=waiting)


def _with_decode(state: DecodeState, link: RecvLink, phase: LeasePhase) -> DecodeState:
    links, leases = state.links.set(STRANGER, link), state.leases.set(NUMBER, _lease(phase))
    return state._replace(links=links, leases=leases, aliases=state.aliases.set(_key(0), NUMBER))


QUEUED = Queued(_key(0), LeaseKey(1, 1), SEGMENT, 1)


def _sender() -> SendLink:
    flights = (Flight(0, 0, Stage.SENDING, QUEUED), Flight(1, 1, Stage.PACKING, QUEUED))
    return Link("P9#1", SlotPool(window=2), next_seq=2, flights=flights, stall_at=FAR)


def _receiver() -> RecvLink:
    chunks = [Chunk(number, LeaseKey(NUMBER, 1), SEGMENT, 1, ()) for number in range(2)]
    flights = (RecvFlight(chunks[0], 0, RecvStage.UNPACKING), RecvFlight(chunks[1], 1, RecvStage.RECEIVING))
    return Link("P9#1", SlotPool(window=2), next_seq=2, flights=flights, stall_at=FAR)


BUSY_SENDER, BUSY_RECEIVER = _sender(), _receiver()
NO_SLOTS: SlotPool[AttemptKey] = SlotPool()
NO_SLOTS_AT_DECODE: SlotPool[int] = SlotPool()
DYING_SENDER: SendLink = Link(slots=NO_SLOTS.lose_epoch("P9#1", (0, 1), (_key(0),)))
DYING_RECEIVER: RecvLink = Link(slots=NO_SLOTS_AT_DECODE.lose_epoch("P9#1", (0, 1), (NUMBER,)))
