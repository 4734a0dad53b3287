"""Which steps are possible from a key, and where they lead, both remembered by what they depend on.

A component's value alone decides which steps start from it; a step changes only the components of its footprint (which
is checked when it is first carried out). So a step from equal components is carried out once, and afterwards a
transition is a few look-ups. `cluster` is the pair slot that a move belongs to, or SEVERAL.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kv_transfer.events import AttemptKey
from tests.transfer.explorer import router
from tests.transfer.explorer.checks import check_deadlines, require
from tests.transfer.explorer.parts import Budget, DecodeEngine, Epoch, Pair, Phase, PrefillEngine, Router, Side
from tests.transfer.explorer.steps import Step, carry_out
from tests.transfer.explorer.world import BUDGET, ENGINE, PROTO, ROUTER, TO_DECODE, TO_PREFILL, Model

Key = tuple[int, ...]
SEVERAL = -1


class Move(NamedTuple):
    step: Step
    footprint: tuple[int, ...]
    cluster: int


class Moves:
    def __init__(self, model: Model) -> None:
        self.model = model
        self._options: dict[tuple[int, int, int], tuple[list[Move], list[Move]]] = {}
        self._effects: dict[tuple[Step, Key], tuple[Key, tuple[Any, ...]]] = {}
        self._heard: dict[tuple[tuple[Any, ...], Key], Key] = {}

    # ---- what can happen

    def of(self, key: Key, max_epochs: int) -> tuple[list[Move], list[Move]]:
        """What happens by itself, and what may be drawn from the budget."""
        budget: Budget = self.model.values[key[BUDGET]]
        progress: list[Move] = []
        faults: list[Move] = []
        for slot, number in enumerate(key):
            found = self._options.get((slot, number, max_epochs))
            if found is None:
                found = self._options[(slot, number, max_epochs)] = self._find(slot, number, max_epochs)
            progress += found[0]
            if budget.left:
                faults += found[1]
        return progress, faults

    def _find(self, slot: int, number: int, max_epochs: int) -> tuple[list[Move], list[Move]]:
        kinds = self.model.config.kinds
        moves = list(self._all(slot, self.model.values[number], max_epochs))
        faults = [move for move in moves if move.step[0] in kinds]
        return [move for move in moves if move.step[0] not in FAULTS], faults

    def _all(self, slot: int, value: Any, max_epochs: int) -> Iterator[Move]:
        model = self.model
        if slot == ROUTER:
            yield from self._of_router(value)
        elif slot == BUDGET:
            return
        elif slot >= model.first_inbox:
            yield from self._of_inbox(*divmod(slot - model.first_inbox, 2), value)
        elif slot >= model.first_pair:
            prefill, decode = divmod(slot - model.first_pair, model.config.decodes)
            yield from self._of_pair(prefill, decode, value, max_epochs)
        else:
            worker, part = divmod(slot - 2, 2)
            yield from self._of_protocol(worker, value) if part == PROTO else self._of_engine(worker, value)

    def _of_router(self, value: Router) -> Iterator[Move]:
        for index, request in enumerate(value.requests):
            name = "open" if request.phase is Phase.IDLE else "cancel" if router.active(request) else None
            if name is not None:
                yield Move((name, index), (ROUTER, BUDGET, *self._inboxes(index)), self._cluster(index))
        for worker, attached in enumerate(value.attached):
            if not attached:
                inboxes = range(self.model.first_inbox, self.model.size)
                yield Move(("router_lost", worker), (ROUTER, *inboxes), SEVERAL)

    def _of_inbox(self, request: int, role: int, commands: tuple[Any, ...]) -> Iterator[Move]:
        spec = self.model.config.requests[request]
        cluster, slot = self._cluster(request), self.model.inbox_slot(request, role)
        worker = spec.prefill if role == TO_PREFILL else self.model.config.prefills + spec.decode
        if commands:
            yield Move(("command", request, role), (slot, *self._local(worker), cluster), cluster)
        for step in channel_faults("inbox", (request, role), commands):
            yield Move(step, (slot, BUDGET), cluster)

    def _of_protocol(self, worker: int, state: Any) -> Iterator[Move]:
        around = (*self._local(worker), BUDGET, *self.model.pairs_of(worker))
        if state.next_deadline() is not None:
            yield Move(("tick", worker), around, SEVERAL)
        inboxes = range(self.model.first_inbox, self.model.size)
        yield Move(("crash", worker), (*around, ROUTER, *inboxes), SEVERAL)

    def _of_engine(self, worker: int, engine: PrefillEngine | DecodeEngine) -> Iterator[Move]:
        local = self._local(worker)
        if isinstance(engine, PrefillEngine):
            for work in engine.work:
                cluster = self._cluster_of(work.key)
                if work.computing and (work.holds or engine.free >= self.model.spec(work.key).num_blocks):
                    yield Move(("compute", worker, work.key), (*local, cluster), cluster)
                if work.computing:
                    yield Move(("refuse", worker, work.key), (*local, cluster, BUDGET), cluster)
            return
        for key, _ in engine.replies:
            yield Move(("reply", worker, key), (*local, self._cluster_of(key)), self._cluster_of(key))
        for running in engine.running:
            yield Move(("decode", worker, running), local, self._cluster_of(running.key))

    def _of_pair(self, prefill: int, decode: int, pair: Pair, max_epochs: int) -> Iterator[Move]:
        slot = self.model.pair_slot(prefill, decode)
        at_prefill = (*self._local(prefill), slot, BUDGET)
        at_decode = (*self._local(self.model.config.prefills + decode), slot, BUDGET)
        both = (*at_prefill, *at_decode[:2])
        for epoch in pair.epochs:
            where = (prefill, decode, epoch.number)
            for name in prefill_side(epoch, self.model.config.fine):
                yield Move((name, *where), at_prefill, slot)
            for name in decode_side(epoch):
                yield Move((name, *where), both if name == "received" else at_decode, slot)
            for channel, messages in (("to_prefill", epoch.to_prefill), ("to_decode", epoch.to_decode)):
                for step in channel_faults(channel, where, messages):
                    yield Move(step, (slot, BUDGET), slot)
            if epoch.prefill is Side.UP and epoch.decode is Side.UP:
                yield Move(("suspect", *where, True), at_prefill, slot)
                yield Move(("suspect", *where, False), at_decode, slot)
        if pair.made < max_epochs and all(epoch.prefill is not Side.UP for epoch in pair.epochs):
            yield Move(("connect", prefill, decode), both, slot)

    def _local(self, worker: int) -> tuple[int, int]:
        return self.model.slot(worker, PROTO), self.model.slot(worker, ENGINE)

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
        before = tuple([key[slot] for slot in move.footprint])
        effect = self._effects.get((move.step, before))
        if effect is None:
            effect = self._effects[(move.step, before)] = self._carry_out(key, move)
        after, calls = effect
        result = list(key)
        for slot, number in zip(move.footprint, after, strict=True):
            result[slot] = number
        return self._hear(result, calls) if calls else tuple(result)

    def _carry_out(self, key: Key, move: Move) -> tuple[Key, tuple[Any, ...]]:
        world = self.model.world(key)
        carry_out(world, move.step)
        calls, world.calls = tuple(world.calls), []
        check_deadlines(world)
        after = world.key()
        changed = [slot for slot, number in enumerate(after) if number != key[slot]]
        require(set(changed) <= set(move.footprint), f"{move.step[0]} reaches beyond its pair: slots {changed}")
        return tuple([after[slot] for slot in move.footprint]), calls

    def _hear(self, key: list[int], calls: tuple[Any, ...]) -> Key:
        """The router takes what a step told it."""
        asked = {call[2] if call[0] == "failed" else call[1] for call in calls}
        indices = sorted({self.model.request_index[attempt.request_id] for attempt in asked})
        footprint = [ROUTER, *(slot for index in indices for slot in self._inboxes(index))]
        before = tuple([key[slot] for slot in footprint])
        after = self._heard.get((calls, before))
        if after is None:
            world = self.model.world(tuple(key))
            world.calls = list(calls)
            router.hear(world)
            heard = world.key()
            after = self._heard[(calls, before)] = tuple([heard[slot] for slot in footprint])
        for slot, number in zip(footprint, after, strict=True):
            key[slot] = number
        return tuple(key)


FAULTS = frozenset({"tick", "crash", "suspect", "corrupt", "refuse", "cancel", "lose", "dup", "swap"})


def prefill_side(epoch: Epoch, fine: bool) -> Iterator[str]:
    if epoch.prefill is Side.CLOSING:
        yield "prefill_destroyed"
    if epoch.prefill is not Side.UP:
        return
    if epoch.to_prefill:
        yield "to_prefill"
    if epoch.packs:
        yield "packed"
    if fine and epoch.sends and epoch.sends[0].moved:
        yield "sent"
    if epoch.decode is not Side.UP:
        yield "prefill_notices"


def decode_side(epoch: Epoch) -> Iterator[str]:
    if epoch.decode is Side.CLOSING:
        yield "decode_destroyed"
    if epoch.decode is not Side.UP:
        return
    if epoch.to_decode:
        yield "to_decode"
    if epoch.recvs and epoch.recvs[0].tag is not None:
        yield "received"
    if epoch.unpacks:
        yield "unpacked"
        yield "corrupt"
    if epoch.prefill is not Side.UP:
        yield "decode_notices"


def channel_faults(channel: str, where: tuple[int, ...], messages: tuple[Any, ...]) -> Iterator[Step]:
    if messages:
        yield ("lose", channel, *where)
        yield ("dup", channel, *where)
    if len(messages) > 1:
        yield ("swap", channel, *where)
