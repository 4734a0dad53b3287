"""A world: one value per component, with the protocol states as numbers of interned states.

`Model` owns the tables that all worlds of one search share. `World` is one state while it is being changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from kv_transfer import protocol
from kv_transfer.events import AttemptKey, DecodeEvent, PeerConnected, PrefillEvent
from kv_transfer.protocol import DecodeState, PrefillState
from tests.transfer.explorer import checks
from tests.transfer.explorer.company import check_company
from tests.transfer.explorer.config import STALL_S, Config, RequestSpec
from tests.transfer.explorer.parts import (
    Budget,
    DecodeEngine,
    DecodeEpoch,
    DecodeHalf,
    Epoch,
    PrefillEngine,
    PrefillEpoch,
    PrefillHalf,
    RecvJob,
    RouterRequest,
)
from tests.transfer.explorer.plans import shared_workers

State = PrefillState | DecodeState
BUDGET, FIRST_WORKER = 0, 1
PROTO, ENGINE, PER_WORKER = 0, 1, 2
TO_PREFILL, TO_DECODE = 0, 1
NEVER = 1000  # connections "made" of a pair that no request uses


class Model:
    """Configuration, layout of the components, interning and memoised protocol steps."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.num_workers = config.prefills + config.decodes
        self.first_pair = FIRST_WORKER + PER_WORKER * self.num_workers
        self.first_inbox = self.first_pair + 2 * config.prefills * config.decodes
        self.first_request = self.first_inbox + 2 * len(config.requests)
        self.size = self.first_request + len(config.requests)
        demand = sum(request.chunks for request in config.requests) * config.attempts
        self.blocks_never_lack = demand <= config.decode_blocks and demand <= config.prefill_blocks
        self.comes_apart = config.reduce and self.blocks_never_lack and len(config.links) > 1
        self.planned = shared_workers(config) if config.reduce else frozenset()  # whose crashes and time are planned
        self.names = [f"P{i}" for i in range(config.prefills)] + [f"D{j}" for j in range(config.decodes)]
        self.workers = {name: number for number, name in enumerate(self.names)}
        self.request_names = [f"r{i}" for i in range(len(config.requests))]
        self.request_index = {name: number for number, name in enumerate(self.request_names)}
        self.values: list[Any] = []
        self._ids: dict[Hashable, int] = {}
        self._steps: dict[tuple[int, Hashable], tuple[int, tuple[Any, ...]]] = {}
        self.proto_slots = frozenset(self.slot(worker, PROTO) for worker in range(self.num_workers))

    def slot(self, worker: int, part: int) -> int:
        return FIRST_WORKER + PER_WORKER * worker + part

    def pair_slot(self, prefill: int, decode: int) -> int:
        """Slot of prefill's half of a pair; decode's half follows. It also names the pair's cluster."""
        return self.first_pair + 2 * (prefill * self.config.decodes + decode)

    def ends(self, prefill: int, decode: int) -> tuple[int, int]:
        """The two workers of a pair."""
        return prefill, self.config.prefills + decode

    def half_slot(self, worker: int, prefill: int, decode: int) -> int:
        """The half of the pair that is at `worker`."""
        return self.pair_slot(prefill, decode) + (not self.is_prefill(worker))

    def inbox_slot(self, request: int, role: int) -> int:
        """Commands about one request on the stream to one of its workers. Requests do not overtake themselves."""
        return self.first_inbox + 2 * request + role

    def request_slot(self, request: int) -> int:
        """The router's view of a request."""
        return self.first_request + request

    def told_slots(self, request: int) -> tuple[int, int, int]:
        """The router's view of a request, and the commands about it that are on their way."""
        return self.request_slot(request), self.inbox_slot(request, TO_PREFILL), self.inbox_slot(request, TO_DECODE)

    def requests_at(self, worker: int) -> list[int]:
        """The requests that use a worker."""
        return [
            index for index, spec in enumerate(self.config.requests) if worker in self.ends(spec.prefill, spec.decode)
        ]

    def halves_of(self, worker: int) -> tuple[int, ...]:
        """Slots of a worker's halves of all its pairs."""
        if self.is_prefill(worker):
            return tuple(self.pair_slot(worker, decode) for decode in range(self.config.decodes))
        decode = worker - self.config.prefills
        return tuple(self.pair_slot(prefill, decode) + 1 for prefill in range(self.config.prefills))

    def is_prefill(self, worker: int) -> bool:
        return worker < self.config.prefills

    def spec(self, key: AttemptKey) -> RequestSpec:
        return self.config.requests[self.request_index[key.request_id]]

    def intern(self, value: Hashable) -> int:
        number = self._ids.get(value)
        if number is None:
            number = self._ids[value] = len(self.values)
            self.values.append(value)
            checks.check_component(self.config, value)
        return number

    def step(self, worker: int, number: int, event: PrefillEvent | DecodeEvent) -> tuple[int, tuple[Any, ...]]:
        """The protocol's step from the interned state `number`; equal states step once."""
        known = self._steps.get((number, event))
        if known is None:
            stepper: Any = protocol.prefill_step if self.is_prefill(worker) else protocol.decode_step
            state, actions = stepper(self.values[number], event)
            check_company(stepper, self.values[number], event, state, actions)
            known = self._steps[(number, event)] = (
                self.intern(state._replace(ended=tuple(sorted(state.ended)))),
                actions,
            )
        return known

    def fresh_protocol(self, worker: int) -> int:
        if self.is_prefill(worker):
            return self.intern(PrefillState.initial(stall_timeout=STALL_S))
        return self.intern(DecodeState.initial(num_layers=1, stall_timeout=STALL_S))

    def fresh_engine(self, worker: int, incarnation: int) -> PrefillEngine | DecodeEngine:
        if self.is_prefill(worker):
            return PrefillEngine(incarnation, self.config.prefill_blocks)
        blocks = self.config.decode_blocks
        return DecodeEngine(incarnation, 100 * incarnation, tuple(range(blocks)), (None,) * blocks)

    def initial(self, budget: Budget) -> World:
        """Every pair connected, every request waiting at the router."""
        values: list[Any] = [None] * self.size
        values[BUDGET] = budget
        for worker in range(self.num_workers):
            values[self.slot(worker, PROTO)] = self.fresh_protocol(worker)
            values[self.slot(worker, ENGINE)] = self.fresh_engine(worker, 0)
        for slot in range(self.first_inbox, self.first_request):
            values[slot] = ()
        for slot in range(self.first_request, self.size):
            values[slot] = RouterRequest()
        for prefill in range(self.config.prefills):
            for decode in range(self.config.decodes):
                linked = (prefill, decode) in self.config.links
                made, slot = (1 if linked else NEVER), self.pair_slot(prefill, decode)
                values[slot] = PrefillHalf(made, (PrefillEpoch(1),) if linked else ())
                values[slot + 1] = DecodeHalf((DecodeEpoch(1),) if linked else ())
                if linked:
                    self._connect(values, prefill, decode)
        return World(self, values)

    def _connect(self, values: list[Any], prefill: int, decode: int) -> None:
        epoch = epoch_name(self, prefill, decode, 1)
        ends = ((prefill, self.config.prefills + decode), (self.config.prefills + decode, prefill))
        for worker, peer in ends:
            slot = self.slot(worker, PROTO)
            event = PeerConnected(self.names[peer], epoch, self.config.window)
            values[slot], _ = self.step(worker, values[slot], event)

    def world(self, key: Sequence[int]) -> World:
        table = self.values
        values = [table[number] for number in key]
        for slot in self.proto_slots:
            values[slot] = key[slot]
        return World(self, values.copy(), values, key)


def epoch_name(model: Model, prefill: int, decode: int, number: int) -> str:
    return f"{model.names[prefill]}{model.names[model.config.prefills + decode]}#{number}"


class World:
    """One state of everything. Actions change it in place; copy it first."""

    __slots__ = ("calls", "idle", "landed", "loaded", "loaded_key", "model", "opening", "values")

    def __init__(
        self, model: Model, values: list[Any], loaded: Sequence[Any] | None = None, loaded_key: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.values = values
        self.opening = 0  # base of the command in hand
        self.landed: RecvJob | None = None  # the receive whose Received is in hand
        self.idle = True  # no protocol step of this move has changed or asked for anything
        self.calls: list[tuple[Any, ...]] = []  # what the router and other halves are told in this step
        self.loaded = [None] * len(values) if loaded is None else loaded  # only what differs from it is interned
        self.loaded_key = loaded_key  # its numbers

    def copy(self) -> World:
        return World(self.model, self.values.copy(), self.loaded, self.loaded_key)

    def key(self) -> tuple[int, ...]:
        loaded, known, proto, intern = self.loaded, self.loaded_key, self.model.proto_slots, self.model.intern
        return tuple(
            [
                known[slot] if value is loaded[slot] else value if slot in proto else intern(value)
                for slot, value in enumerate(self.values)
            ]
        )

    def changes(self) -> tuple[tuple[int, int], ...]:
        """The slots that differ from those of the key that was loaded, and the numbers of their new values."""
        known, proto, intern = self.loaded_key, self.model.proto_slots, self.model.intern
        pairs = enumerate(zip(self.values, self.loaded, strict=True))
        touched = [
            (slot, value if slot in proto else intern(value)) for slot, (value, old) in pairs if value is not old
        ]
        return tuple([(slot, number) for slot, number in touched if number != known[slot]])

    @property
    def requests(self) -> list[RouterRequest]:
        return self.values[self.model.first_request :]

    @property
    def budget(self) -> Budget:
        return self.values[BUDGET]  # type: ignore[no-any-return]

    def state(self, worker: int) -> Any:
        return self.model.values[self.values[self.model.slot(worker, PROTO)]]

    def engine(self, worker: int) -> Any:
        return self.values[self.model.slot(worker, ENGINE)]

    def set_engine(self, worker: int, engine: PrefillEngine | DecodeEngine) -> None:
        self.values[self.model.slot(worker, ENGINE)] = engine

    def half(self, slot: int) -> Any:
        return self.values[slot]

    def set_epoch(self, slot: int, epoch: Epoch) -> None:
        """Put the epoch back into its half; one that neither side knows is forgotten."""
        half = self.values[slot]
        gone = not epoch.side and not epoch.peer
        kept = [epoch if other.number == epoch.number else other for other in half.epochs]
        if gone:
            kept.remove(epoch)
        self.values[slot] = half._replace(epochs=tuple(kept))

    def tell_router(self, *what: Any) -> None:
        self.calls.append(("router", *what))

    def tell_peer(self, slot: int, *what: Any) -> None:
        """Something for the other half of the pair whose half is `slot`."""
        other = slot + 1 if (slot - self.model.first_pair) % 2 == 0 else slot - 1
        self.calls.append(("half", other, *what))
