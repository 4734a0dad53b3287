"""Checks that a step of one link has nothing to do with any other, whenever a step is carried out and remembered."""

from __future__ import annotations

from typing import Any

from kv_transfer.decode_state import DecodeState
from tests.transfer.explorer.checks import require
from tests.transfer.explorer.move import Key
from tests.transfer.explorer.parts import DecodeEngine
from tests.transfer.explorer.plans import may_see_time
from tests.transfer.explorer.slices import Slices
from tests.transfer.explorer.steps import Step, carry_out
from tests.transfer.explorer.world import BUDGET, Model

Outcome = tuple[Key, tuple[tuple[Any, ...], ...], bool]  # the world after a step, whom it calls, whether it was idle


class Frame:
    """Owned by the moves of one search."""

    def __init__(self, model: Model, slices: Slices) -> None:
        self.model = model
        self.slices = slices

    def check(self, before: Key, step: Step, link: int, outcome: Outcome) -> None:
        """The step does the same in a world that has its link only, and leaves all others as they are."""
        own, others = frozenset({link}), self.slices.links - {link}
        after, *rest = outcome
        if not self._sets_apart(before, step):
            alone = self._take(self.slices.project(before, own), step)
            require(alone == (self.slices.project(after, own), *rest), f"{step[0]} depends on what another link does")
        pairs = zip(self.slices.project(before, others), self.slices.project(after, others), strict=True)
        changed = [slot for slot, (old, new) in enumerate(pairs) if slot != BUDGET and not self._same(old, new)]
        require(not changed, f"{step[0]} changes what belongs to another link: slots {changed}")

    def _sets_apart(self, key: Key, step: Step) -> bool:
        """A command whose deadline follows the worker's others, while time at the worker is planned to pass."""
        if step[0] != "command":
            return False
        spec = self.model.config.requests[step[1]]
        worker = self.model.ends(spec.prefill, spec.decode)[step[2]]
        return worker in self.model.planned and may_see_time(self.model, self.model.values[key[BUDGET]], worker)

    def _take(self, key: Key, step: Step) -> Outcome:
        world = self.model.world(key)
        carry_out(world, step)
        return world.key(), tuple(world.calls), world.idle

    def _same(self, old: int, new: int) -> bool:
        """Equal but for what one worker's links draw from one store: free blocks, numbers of leases and generations."""
        if old == new:
            return True
        was, now = self.model.values[old], self.model.values[new]
        if isinstance(was, DecodeState):
            return bool(was == now._replace(next_lease=was.next_lease))
        if isinstance(was, DecodeEngine):
            return bool(was == now._replace(stamp=was.stamp, free=was.free, elsewhere=was.elsewhere))
        return False
