"""Which of the possible moves are enough: partial-order reduction, argued in README.md."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from kv_transfer.messages import Abort, ChunksDone, Committed, Finish
from tests.transfer.explorer.effects import Effects
from tests.transfer.explorer.move import Key, Move
from tests.transfer.explorer.parts import Budget, CancelCommand, DecodeEngine, Side
from tests.transfer.explorer.slices import Slices
from tests.transfer.explorer.world import BUDGET, ENGINE, Model


class Reduction:
    """Owned by one search. Stateless but for what the configuration decides once."""

    def __init__(self, model: Model, effects: Effects, slices: Slices) -> None:
        config = model.config
        self.model, self.effects, self.slices = model, effects, slices
        self.enabled, self.fine = config.reduce, config.fine
        demand = sum(request.chunks for request in config.requests) * config.attempts
        self.credits_never_lack = demand <= config.window
        self._halves = [_both_halves(model, worker) for worker in range(model.num_workers)]
        self._stranded: list[dict[Key, bool]] = [{} for _ in self._halves]

    def enough(self, key: Key, progress: list[Move], faults: list[Move]) -> list[Move]:
        if not self.fine:
            for move in progress:
                if move.name == "sent":
                    return [move]
        if not self.enabled:
            return progress + faults
        budget: Budget = self.model.values[key[BUDGET]]
        if not budget.left and not budget.plan:
            for move in progress:
                if self._is_harmless(key, move):
                    return [move]
        if budget.plan and self.model.comes_apart:
            links = self.slices.links_at(self.model.workers[budget.plan[0][1]])
            return [move for move in progress + faults if move.cluster in links]
        return progress + faults

    def _is_harmless(self, key: Key, move: Move) -> bool:
        """Taking it first loses nothing, once no fault can come any more: it commutes with all that may come before."""
        if move.name == "decode":
            return True
        if move.head is not None:
            if isinstance(move.head, ChunksDone) and self.credits_never_lack:
                return True
            if isinstance(move.head, CancelCommand):
                return self.effects.is_idle(key, move) and not self._runs(key, move)
            if isinstance(move.head, Abort | Committed | Finish) and self.effects.is_idle(key, move):
                return True
        return move.worker is not None and self.model.blocks_never_lack and self._is_stranded(key, move.worker)

    def _runs(self, key: Key, cancel: Move) -> bool:
        """Whether the attempt that is cancelled runs at the worker already."""
        engine = self.model.values[key[self.model.slot(cancel.worker or 0, ENGINE)]]
        return isinstance(engine, DecodeEngine) and any(running.key == cancel.head.key for running in engine.running)

    def _is_stranded(self, key: Key, worker: int) -> bool:
        """No connection and none to come: everything at this worker has ended or is refused when it arrives."""
        halves: tuple[int, ...] = self._halves[worker](key)
        stranded = self._stranded[worker].get(halves)
        if stranded is None:
            pairs = zip(halves[::2], halves[1::2], strict=True)
            stranded = self._stranded[worker][halves] = all(self._is_dead(*pair) for pair in pairs)
        return stranded

    def _is_dead(self, half: int, dialling: int) -> bool:
        """Of a worker's half of a pair, and prefill's half, by their values' numbers."""
        connected = any(epoch.side is Side.UP for epoch in self.model.values[half].epochs)
        return not connected and bool(self.model.values[dialling].made >= self.model.config.epochs)


def _both_halves(model: Model, worker: int) -> Any:
    """Picks from a key, for all pairs of a worker: its half, and prefill's half."""
    slots = [(slot, slot if model.is_prefill(worker) else slot - 1) for slot in model.halves_of(worker)]
    return itemgetter(*[slot for pair in slots for slot in pair])
