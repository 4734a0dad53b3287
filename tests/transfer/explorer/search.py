"""Breadth-first search over all worlds, and the report of what it found.

States are keys: the numbers of their interned components, packed. Two states are the same only if every component is
equal (no hash compaction), up to the symmetries of the configuration.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from struct import Struct

from tests.transfer.explorer.config import Config
from tests.transfer.explorer.effects import Effects
from tests.transfer.explorer.endings import Endings
from tests.transfer.explorer.move import Key, Move
from tests.transfer.explorer.moves import Moves
from tests.transfer.explorer.parts import Violation
from tests.transfer.explorer.plans import STRIKES, budgets
from tests.transfer.explorer.reduction import Reduction
from tests.transfer.explorer.slices import Slices
from tests.transfer.explorer.symmetry import Symmetry
from tests.transfer.explorer.trace import Replay
from tests.transfer.explorer.world import Model

CLOCK_EVERY = 1024  # states between two looks at the clock, which may cost more than a state


@dataclass(slots=True)
class Result:
    """`violation` is None and `exhausted` True when every reachable state was visited and none was wrong."""

    config: Config
    states: int = 0
    transitions: int = 0
    quiet: int = 0
    seconds: float = 0.0
    exhausted: bool = False
    violation: str | None = None
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.config.name}: {self.states} states, {self.transitions} transitions, {self.quiet} quiet states, "
            f"{self.seconds:.1f} s",
            f"frontier exhausted: {'yes' if self.exhausted else 'no'}",
        ]
        if self.violation is not None:
            lines += [f"VIOLATION {self.violation}", *self.trace]
        return "\n".join(lines)


class Search:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = Model(config)
        self.symmetry = Symmetry(self.model)
        self.seen: set[bytes] = set()
        self.keys: list[bytes] = []
        self.parents = array("l")
        self.slices = Slices(self.model)
        self.moves = Moves(self.model)
        self.effects = Effects(self.model, self.slices)
        self.endings = Endings(self.moves, self.effects)
        self.reduction = Reduction(self.model, self.effects, self.slices)
        self.layout = Struct(f"{self.model.size}I")
        self.unpack: Callable[[bytes], Key] = self.layout.unpack
        self.result = Result(config)

    def run(self, max_states: int = 50_000_000, max_seconds: float = 3600.0) -> Result:
        """Visit everything, or stop at the first violation or at a limit. The collector is off: nothing is cyclic."""
        start = time.process_time()
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._visit(max_states, start + max_seconds)
        finally:
            if collecting:
                gc.enable()
        self.result.states = len(self.keys)
        self.result.seconds = time.process_time() - start
        return self.result

    def _visit(self, max_states: int, end: float) -> None:
        for budget in budgets(self.model):
            self._add_all(self.model.initial(budget).key(), -1)
        number = 0
        while number < len(self.keys):
            if len(self.keys) > max_states or (number % CLOCK_EVERY == 0 and time.process_time() > end):
                return
            try:
                self._expand(number)
            except _StepViolation as wrong:
                self._report(number, wrong.move, str(wrong.violation))
                return
            except Violation as wrong:
                self._report(number, None, str(wrong))
                return
            number += 1
        self.result.exhausted = True

    def _add_all(self, key: Key, parent: int) -> None:
        """A world, or the parts that it comes apart into when a planned fault is over."""
        for part in self.slices.of(key) if self.model.comes_apart else [key]:
            self._add(self.symmetry.canonical(part), parent)

    def _add(self, key: Key, parent: int) -> None:
        packed = self.layout.pack(*key)
        if packed not in self.seen:
            self.seen.add(packed)
            self.keys.append(packed)
            self.parents.append(parent)

    def _expand(self, number: int) -> None:
        key = self.unpack(self.keys[number])
        progress, faults = self.moves.of(key, self.config.epochs)
        for move in self.reduction.enough(key, progress, faults):
            self._take(key, move, number)
        if not progress:
            self.result.quiet += 1
            self.endings.check(key)

    def _take(self, key: Key, move: Move, number: int) -> None:
        self.result.transitions += 1
        try:
            after = self.effects.take(key, move)
        except Violation as violation:
            raise _StepViolation(move, violation) from violation
        if move.name in STRIKES and self.model.comes_apart:
            self._add_all(after, number)
        else:
            self._add(self.symmetry.canonical(after), number)

    def _report(self, number: int, move: Move | None, text: str) -> None:
        self.result.violation = text
        path = [number]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        keys = [self.unpack(self.keys[index]) for index in reversed(path)]
        replay = Replay(self.moves, self.effects, self.slices, self.symmetry)
        self.result.trace = replay.lines(keys, move)


class _StepViolation(Exception):
    def __init__(self, move: Move, violation: Violation) -> None:
        super().__init__(str(violation))
        self.move = move
        self.violation = violation


def explore(config: Config, max_states: int = 50_000_000, max_seconds: float = 3600.0) -> Result:
    return Search(config).run(max_states, max_seconds)
