"""Which steps are possible from a key, and where they lead, both remembered by what they depend on.

A component's value alone decides which steps start from it; a step changes only the components of its footprint (which
is checked when it is first carried out). So a step from equal components is carried out once, and afterwards a
transition is a few look-ups. `cluster` is the pair slot that a move belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kv_transfer.events import AttemptKey
from tests.transfer.explorer import halves, router
from tests.transfer.explorer.checks import check_deadlines, require
from tests.transfer.explorer.frame import Frame
from tests.transfer.explorer.parts import (
    Budget,
    DecodeEngine,
    DecodeEpoch,
    Epoch,
    Half,
    Phase,
    PrefillEngine,
    PrefillEpoch,
    PrefillHalf,
    RouterRequest,
    Side,
    Violation,
)
from tests.transfer.explorer.plans import STRIKES, is_next
from tests.transfer.explorer.slices import Slices
from tests.transfer.explorer.steps import Step, carry_out
from tests.transfer.explorer.world import BUDGET, ENGINE, FIRST_WORKER, PER_WORKER, PROTO, TO_DECODE, TO_PREFILL, Model

Key = tuple[int, ...]
Calls = tuple[tuple[Any, ...], ...]


class Move(NamedTuple):
    step: Step
    footprint: tuple[int, ...]
    cluster: int


class Options(NamedTuple):
    """What may start from a component. `strikes` come when the plan says so."""

    progress: list[Move]
    faults: list[Move]
    strikes: list[Move]


NOTHING = Options([], [], [])


class Moves:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.slices = Slices(model)
        self.frame = Frame(model, self.slices) if model.comes_apart else None
        self._options: dict[int, list[dict[int, Options]]] = {}  # by the number of epochs, slot and value
        self._effects: dict[tuple[Step, Key], tuple[Key, Calls, bool]] = {}
        self._heard: dict[tuple[tuple[Any, ...], Key], tuple[Key, Calls]] = {}

    # ---- what can happen

    def of(self, key: Key, max_epochs: int) -> tuple[list[Move], list[Move]]:
        """What happens by itself, and what may be drawn from the budget."""
        budget: Budget = self.model.values[key[BUDGET]]
        progress: list[Move] = []
        faults: list[Move] = []
        if max_epochs not in self._options:
            self._options[max_epochs] = [{} for _ in key]
        for slot, (number, options) in enumerate(zip(key, self._options[max_epochs], strict=True)):
            found = options.get(number)
            if found is None:
                found = options[number] = self._find(slot, number, max_epochs)
            if found is NOTHING:
                continue
            progress += found.progress
            if budget.left:
                faults += found.faults
            if budget.plan and found.strikes:
                faults += [move for move in found.strikes if is_next(self.model, budget, move.step[0], move.step[1])]
        return progress, faults

    def _find(self, slot: int, number: int, max_epochs: int) -> Options:
        kinds, planned = self.model.config.kinds, self.model.planned
        moves = list(self._all(slot, self.model.values[number], max_epochs))
        if not moves:
            return NOTHING
        faults = [move for move in moves if move.step[0] in kinds]
        strikes = [move for move in faults if move.step[0] in STRIKES and move.step[1] in planned]
        return Options(
            [move for move in moves if move.step[0] not in FAULTS],
            [move for move in faults if move not in strikes],
            strikes,
        )

    def _all(self, slot: int, value: Any, max_epochs: int) -> Iterator[Move]:
        model = self.model
        if slot == BUDGET:
            return
        if slot >= model.first_request:
            yield from self._of_request(slot - model.first_request, value)
        elif slot >= model.first_inbox:
            yield from self._of_inbox(*divmod(slot - model.first_inbox, 2), value)
        elif slot >= model.first_pair:
            yield from self._of_half(slot, value, max_epochs)
        else:
            worker, part = divmod(slot - FIRST_WORKER, PER_WORKER)
            yield from self._of_protocol(worker, value) if part == PROTO else self._of_engine(worker, value)

    def _of_request(self, index: int, request: RouterRequest) -> Iterator[Move]:
        around, cluster = self._told(index), self._cluster(index)
        if request.phase is Phase.IDLE:
            yield Move(("open", index), around, cluster)
        if router.active(request):
            yield Move(("cancel", index), (*around, BUDGET), cluster)
        for role in (TO_PREFILL, TO_DECODE):
            if request.broken[role]:
                yield Move(("router_lost", index, role), around, cluster)

    def _of_inbox(self, request: int, role: int, commands: tuple[Any, ...]) -> Iterator[Move]:
        spec = self.model.config.requests[request]
        cluster, slot = self._cluster(request), self.model.inbox_slot(request, role)
        worker = spec.prefill if role == TO_PREFILL else self.model.config.prefills + spec.decode
        if commands:
            plan = (BUDGET,) if "tick" in self.model.config.kinds else ()
            yield Move(("command", request, role), (slot, *self._local(worker), cluster + role, *plan), cluster)
        for step in channel_faults("inbox", (request, role), commands):
            yield Move(step, (slot, BUDGET), cluster)

    def _of_protocol(self, worker: int, state: Any) -> Iterator[Move]:
        around = (*self._local(worker), BUDGET, *self.model.halves_of(worker))
        if state.next_deadline() is not None:
            yield Move(("tick", worker), around, self._first_link(worker))
        told = [slot for index in self.model.requests_at(worker) for slot in self._told(index)]
        yield Move(("crash", worker), (*around, *told), self._first_link(worker))

    def _of_engine(self, worker: int, engine: PrefillEngine | DecodeEngine) -> Iterator[Move]:
        local, half = self._local(worker), 0 if self.model.is_prefill(worker) else 1
        if isinstance(engine, PrefillEngine):
            for work in engine.work:
                cluster = self._cluster_of(work.key)
                if work.computing and (work.holds or engine.free >= self.model.spec(work.key).num_blocks):
                    yield Move(("compute", worker, work.key), (*local, cluster), cluster)
                if work.computing:
                    yield Move(("refuse", worker, work.key), (*local, cluster, BUDGET), cluster)
            return
        for key, _ in engine.replies:
            yield Move(("reply", worker, key), (*local, self._cluster_of(key) + half), self._cluster_of(key))
        for running in engine.running:
            yield Move(("decode", worker, running), local, self._cluster_of(running.key))

    def _of_half(self, slot: int, half: Half, max_epochs: int) -> Iterator[Move]:
        """`cluster` is the slot of prefill's half, which stands for the pair."""
        index, role = divmod(slot - self.model.first_pair, 2)
        prefill, decode = divmod(index, self.model.config.decodes)
        worker, cluster = (self.model.config.prefills + decode, slot - 1) if role else (prefill, slot)
        around = (*self._local(worker), slot)
        for epoch in half.epochs:
            where = (worker, prefill, decode, epoch.number)
            for name in possible(epoch):
                yield Move((name, *where), (*around, BUDGET) if name in FAULTS else around, cluster)
            for step in channel_faults("link", where, epoch.inbound):
                yield Move(step, (slot, BUDGET), cluster)
        if isinstance(half, PrefillHalf) and half.made < max_epochs and not any(e.side is Side.UP for e in half.epochs):
            both = (*around, *self._local(self.model.config.prefills + decode), slot + 1)
            yield Move(("connect", prefill, decode), both, cluster)

    def _first_link(self, worker: int) -> int:
        """What hits a worker hits all its links: the reduction keeps them together."""
        links = [link for link in self.model.config.links if worker in self.model.ends(*link)]
        return self.model.pair_slot(*min(links))

    def _local(self, worker: int) -> tuple[int, int]:
        return self.model.slot(worker, PROTO), self.model.slot(worker, ENGINE)

    def _told(self, request: int) -> tuple[int, int, int]:
        return (self.model.request_slot(request), *self._inboxes(request))

    def _inboxes(self, request: int) -> tuple[int, int]:
        return self.model.inbox_slot(request, TO_PREFILL), self.model.inbox_slot(request, TO_DECODE)

    def _cluster(self, request: int) -> int:
        spec = self.model.config.requests[request]
        return self.model.pair_slot(spec.prefill, spec.decode)

    def _cluster_of(self, key: AttemptKey) -> int:
        return self._cluster(self.model.request_index[key.request_id])

    # ---- where it leads

    def take(self, key: Key, move: Move) -> Key:
        """The key after a move. Raises Violation."""
        after, calls, _ = self._effect(key, move)
        result = list(key)
        for slot, number in zip(move.footprint, after, strict=True):
            result[slot] = number
        while calls:
            calls = self._hear(result, calls[0]) + calls[1:]
        return tuple(result)

    def is_idle(self, key: Key, move: Move) -> bool:
        """Whether the protocol neither changes nor asks for anything at this move. A violation is not idle."""
        try:
            return self._effect(key, move)[2]
        except Violation:
            return False

    def _effect(self, key: Key, move: Move) -> tuple[Key, Calls, bool]:
        """What the footprint becomes, what others are told, whether the protocol stays idle."""
        before = tuple([key[slot] for slot in move.footprint])
        effect = self._effects.get((move.step, before))
        if effect is None:
            effect = self._effects[(move.step, before)] = self._carry_out(key, move)
        return effect

    def _carry_out(self, key: Key, move: Move) -> tuple[Key, Calls, bool]:
        world = self.model.world(key)
        carry_out(world, move.step)
        after = world.key()
        changed = {slot for slot, number in enumerate(after) if number != key[slot]}
        touched = {(slot - FIRST_WORKER) // PER_WORKER for slot in changed & self.model.proto_slots}
        check_deadlines(world, touched)
        require(changed <= set(move.footprint), f"{move.step[0]} reaches beyond its pair: slots {changed}")
        if self.frame is not None and move.step[0] not in ("time", *STRIKES):
            self.frame.check(key, move.step, move.cluster, (after, tuple(world.calls), world.idle))
        return tuple([after[slot] for slot in move.footprint]), tuple(world.calls), world.idle

    def _hear(self, key: list[int], call: tuple[Any, ...]) -> Calls:
        """Carry out one call of a step. Changes `key`, returns what it calls in turn."""
        footprint = self._reach(call)
        before = tuple([key[slot] for slot in footprint])
        heard = self._heard.get((call, before))
        if heard is None:
            heard = self._heard[(call, before)] = self._carry_out_call(tuple(key), call, footprint)
        for slot, number in zip(footprint, heard[0], strict=True):
            key[slot] = number
        return heard[1]

    def _reach(self, call: tuple[Any, ...]) -> tuple[int, ...]:
        if call[0] == "half":
            return (call[1],)
        return self._told(self.model.request_index[call[2].request_id])

    def _carry_out_call(self, key: Key, call: tuple[Any, ...], footprint: tuple[int, ...]) -> tuple[Key, Calls]:
        world = self.model.world(key)
        kind, *details = call
        (halves.receive if kind == "half" else router.hear)(world, *details)
        after = world.key()
        return tuple([after[slot] for slot in footprint]), tuple(world.calls)


FAULTS = frozenset({"tick", "crash", "suspect", "corrupt", "refuse", "cancel", "lose", "dup", "swap"})


def possible(epoch: Epoch) -> Iterator[str]:
    """Steps at one side of a connection."""
    if epoch.side is Side.CLOSING:
        yield "destroyed"
    if epoch.side is not Side.UP:
        return
    if epoch.inbound:
        yield "deliver"
    yield from _sending(epoch) if isinstance(epoch, PrefillEpoch) else _receiving(epoch)
    yield "notices" if epoch.peer is not Side.UP else "suspect"


def _sending(epoch: PrefillEpoch) -> Iterator[str]:
    if epoch.packs:
        yield "packed"
    if epoch.sends and epoch.sends[0].moved:
        yield "sent"


def _receiving(epoch: DecodeEpoch) -> Iterator[str]:
    if epoch.recvs and epoch.recvs[0].tag is not None:
        yield "received"
    if epoch.unpacks:
        yield "unpacked"
        yield "corrupt"


def channel_faults(channel: str, where: tuple[int, ...], messages: tuple[Any, ...]) -> Iterator[Step]:
    if messages:
        yield ("lose", channel, *where)
        yield ("dup", channel, *where)
    if len(messages) > 1:
        yield ("swap", channel, *where)
