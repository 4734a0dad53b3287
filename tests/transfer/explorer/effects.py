"""Where moves lead, remembered by what they depend on.

A step changes only the components of its footprint, which is checked when it is first carried out. So a step from equal
components is carried out once, and afterwards a transition is a few look-ups.
"""

from __future__ import annotations

from typing import Any

from tests.transfer.explorer import halves, router
from tests.transfer.explorer.checks import check_deadlines, require
from tests.transfer.explorer.frame import Frame
from tests.transfer.explorer.move import Call, Changes, Effect, Key, Move
from tests.transfer.explorer.parts import Violation
from tests.transfer.explorer.plans import STRIKES
from tests.transfer.explorer.slices import Slices
from tests.transfer.explorer.steps import carry_out
from tests.transfer.explorer.world import PROTO, Model


class Effects:
    """Owned by one search."""

    def __init__(self, model: Model, slices: Slices) -> None:
        self.model = model
        self.frame = Frame(model, slices) if model.comes_apart else None
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._worker_at = {model.slot(worker, PROTO): worker for worker in range(model.num_workers)}

    def take(self, key: Key, move: Move) -> Key:
        """The key after a move. Raises Violation."""
        effect = move.effects.get(move.pick(key)) or self._carry_out(key, move)
        result = list(key)
        for slot, number in effect.changes:
            result[slot] = number
        for call in effect.calls:
            self._hear(result, call)
        return tuple(result)

    def is_idle(self, key: Key, move: Move) -> bool:
        """Whether the protocol neither changes nor asks for anything at this move. A violation is not idle."""
        try:
            return (move.effects.get(move.pick(key)) or self._carry_out(key, move)).idle
        except Violation:
            return False

    def _carry_out(self, key: Key, move: Move) -> Effect:
        world = self.model.world(key)
        carry_out(world, move.step)
        changes = world.changes()
        beyond = [slot for slot, _ in changes if slot not in move.footprint]
        if beyond:
            raise Violation(f"{move.name} reaches beyond its pair: slots {beyond}")
        check_deadlines(world, [self._worker_at[slot] for slot, _ in changes if slot in self._worker_at])
        if self.frame is not None and move.name not in ("time", *STRIKES):
            self.frame.check(key, move.step, move.cluster, (world.key(), tuple(world.calls), world.idle))
        effect = Effect(changes, self._found(world.calls), world.idle)
        move.effects[move.pick(key)] = effect
        return effect

    def _hear(self, key: list[int], call: Call) -> None:
        """Carry out one call of a step, and all that follows from it. Changes `key`."""
        heard = call.heard.get(call.pick(key))
        if heard is None:
            heard = self._carry_out_call(tuple(key), call)
        changes, calls = heard
        for slot, number in changes:
            key[slot] = number
        for other in calls:
            self._hear(key, other)

    def _carry_out_call(self, key: Key, call: Call) -> tuple[Changes, tuple[Call, ...]]:
        world = self.model.world(key)
        kind, *details = call.what
        (halves.receive if kind == "half" else router.hear)(world, *details)
        changes = world.changes()
        reached = self._reach(call.what)
        require(all(slot in reached for slot, _ in changes), f"{call.what[1]} reaches beyond whom it is told")
        heard = call.heard[call.pick(key)] = changes, self._found(world.calls)
        return heard

    def _found(self, calls: list[tuple[Any, ...]]) -> tuple[Call, ...]:
        for what in calls:
            if what not in self._calls:
                self._calls[what] = Call(what, self._reach(what))
        return tuple([self._calls[what] for what in calls])

    def _reach(self, what: tuple[Any, ...]) -> tuple[int, ...]:
        """All that the call reads or changes."""
        if what[0] == "half":
            return (what[1],)
        return self.model.told_slots(self.model.request_index[what[2].request_id])
