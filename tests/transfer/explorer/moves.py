"""Which steps are possible from a key, remembered by what it depends on.

A component's value alone decides which steps start from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import getitem
from typing import Any, NamedTuple

from kv_transfer.events import AttemptKey
from kv_transfer.protocol import next_deadline
from tests.transfer.explorer import router
from tests.transfer.explorer.memo import Memo
from tests.transfer.explorer.move import Key, Move
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
)
from tests.transfer.explorer.plans import STRIKES, is_next
from tests.transfer.explorer.steps import Step
from tests.transfer.explorer.world import BUDGET, ENGINE, FIRST_WORKER, PER_WORKER, PROTO, TO_DECODE, TO_PREFILL, Model


class Options(NamedTuple):
    """What may start from a component. `strikes` come when the plan says so."""

    progress: list[Move]
    faults: list[Move]
    strikes: list[Move]


class Moves:
    """Owned by one search."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._options = Memo(self._tables)  # by the number of epochs, slot and value
        everything = tuple(range(model.size))
        self._times = [Move(("time", worker), everything, 0) for worker in range(model.num_workers)]

    def time(self, worker: int) -> Move:
        """Time passes at a worker until its next deadline, without a fault."""
        return self._times[worker]

    def of(self, key: Key, max_epochs: int) -> tuple[list[Move], list[Move]]:
        """What happens by itself, and what may be drawn from the budget."""
        budget: Budget = self.model.values[key[BUDGET]]
        progress: list[Move] = []
        faults: list[Move] = []
        for found in filter(None, map(getitem, self._options[max_epochs], key)):
            progress += found.progress
            if budget.left:
                faults += found.faults
            if budget.plan and found.strikes:
                faults += [move for move in found.strikes if is_next(self.model, budget, move.name, move.step[1])]
        return progress, faults

    def _tables(self, max_epochs: int) -> list[Memo[int, Options | None]]:
        return [Memo(partial(self._find, slot, max_epochs)) for slot in range(self.model.size)]

    def _find(self, slot: int, max_epochs: int, number: int) -> Options | None:
        kinds, planned = self.model.config.kinds, self.model.planned
        moves = list(self._all(slot, self.model.values[number], max_epochs))
        if not moves:
            return None
        faults = [move for move in moves if move.name in kinds]
        strikes = [move for move in faults if move.name in STRIKES and move.step[1] in planned]
        return Options(
            [move for move in moves if move.name not in FAULTS],
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
        around, cluster = self.model.told_slots(index), self._cluster(index)
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
            around = (slot, *self._local(worker), cluster + role, *plan)
            yield Move(("command", request, role), around, cluster, worker, commands[0])
        for step in channel_faults("inbox", (request, role), commands):
            yield Move(step, (slot, BUDGET), cluster)

    def _of_protocol(self, worker: int, state: Any) -> Iterator[Move]:
        around = (*self._local(worker), BUDGET, *self.model.halves_of(worker))
        if next_deadline(state) is not None:
            yield Move(("tick", worker), around, self._first_link(worker))
        told = [slot for index in self.model.requests_at(worker) for slot in self.model.told_slots(index)]
        yield Move(("crash", worker), (*around, *told), self._first_link(worker))

    def _of_engine(self, worker: int, engine: PrefillEngine | DecodeEngine) -> Iterator[Move]:
        local, half = self._local(worker), 0 if self.model.is_prefill(worker) else 1
        if isinstance(engine, PrefillEngine):
            for work in engine.work:
                cluster = self._cluster_of(work.key)
                if work.computing and (work.holds or engine.free >= self.model.spec(work.key).num_blocks):
                    yield Move(("compute", worker, work.key), (*local, cluster), cluster, worker)
                if work.computing:
                    yield Move(("refuse", worker, work.key), (*local, cluster, BUDGET), cluster)
            return
        for key, _ in engine.replies:
            cluster = self._cluster_of(key)
            yield Move(("reply", worker, key), (*local, cluster + half), cluster, worker)
        for running in engine.running:
            yield Move(("decode", worker, running), local, self._cluster_of(running.key), worker)

    def _of_half(self, slot: int, half: Half, max_epochs: int) -> Iterator[Move]:
        """`cluster` is the slot of prefill's half, which stands for the pair."""
        index, role = divmod(slot - self.model.first_pair, 2)
        prefill, decode = divmod(index, self.model.config.decodes)
        worker, cluster = (self.model.config.prefills + decode, slot - 1) if role else (prefill, slot)
        around = (*self._local(worker), slot)
        for epoch in half.epochs:
            where = (worker, prefill, decode, epoch.number)
            for name in possible(epoch):
                head = epoch.inbound[0] if name == "deliver" else None
                yield Move((name, *where), (*around, BUDGET) if name in FAULTS else around, cluster, worker, head)
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

    def _cluster(self, request: int) -> int:
        spec = self.model.config.requests[request]
        return self.model.pair_slot(spec.prefill, spec.decode)

    def _cluster_of(self, key: AttemptKey) -> int:
        return self._cluster(self.model.request_index[key.request_id])


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
