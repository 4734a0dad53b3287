"""Which of the possible moves are enough: partial-order reduction, argued in README.md."""

from __future__ import annotations

from typing import Any

from kv_transfer.events import AttemptKey
from kv_transfer.messages import Abort, ChunksDone, Committed, Finish
from tests.transfer.explorer.moves import Key, Move, Moves
from tests.transfer.explorer.parts import Budget, CancelCommand, DecodeEngine, Side
from tests.transfer.explorer.world import BUDGET, ENGINE, TO_PREFILL


class Reduction:
    """Owned by one search. Stateless but for what the configuration decides once."""

    def __init__(self, moves: Moves) -> None:
        model, config = moves.model, moves.model.config
        self.moves = moves
        self.model = model
        self.enabled, self.fine = config.reduce, config.fine
        demand = sum(request.chunks for request in config.requests) * config.attempts
        self._dead: dict[tuple[int, int], bool] = {}
        self._halves = [
            [(slot, slot if model.is_prefill(worker) else slot - 1) for slot in model.halves_of(worker)]
            for worker in range(model.num_workers)
        ]
        self.credits_never_lack = demand <= config.window

    def enough(self, key: Key, progress: list[Move], faults: list[Move]) -> list[Move]:
        everything = progress + faults
        if not self.fine:
            at_once = next((move for move in progress if move.step[0] == "sent"), None)
            if at_once is not None:
                return [at_once]
        if not self.enabled:
            return everything
        budget: Budget = self.model.values[key[BUDGET]]
        if not budget.left and not budget.plan:
            harmless = next((move for move in progress if self._is_harmless(key, move)), None)
            if harmless is not None:
                return [harmless]
        if budget.plan and self.model.comes_apart:
            links = self.moves.slices.links_at(self.model.workers[budget.plan[0][1]])
            return [move for move in everything if move.cluster in links]
        return everything

    def _is_harmless(self, key: Key, move: Move) -> bool:
        """Taking it first loses nothing, once no fault can come any more: it commutes with all that may come before."""
        name, *where = move.step
        if name == "decode":
            return True
        if name in ("command", "deliver"):
            what = self._head(key, name, where)
            if isinstance(what, ChunksDone) and self.credits_never_lack:
                return True
            if isinstance(what, CancelCommand):
                return self.moves.is_idle(key, move) and not self._runs(key, what.key, where)
            if isinstance(what, Abort | Committed | Finish) and self.moves.is_idle(key, move):
                return True
        worker = self._worker_of(name, where)
        return worker is not None and self.model.blocks_never_lack and self._is_stranded(key, worker)

    def _head(self, key: Key, name: str, where: list[Any]) -> Any:
        """The message or command that the move delivers."""
        if name == "command":
            return self.model.values[key[self.model.inbox_slot(*where)]][0]
        half = self.model.values[key[self.model.half_slot(*where[:3])]]
        return next(epoch for epoch in half.epochs if epoch.number == where[3]).inbound[0]

    def _runs(self, key: Key, attempt: AttemptKey, where: list[Any]) -> bool:
        worker = self._worker_of("command", where)
        engine = self.model.values[key[self.model.slot(worker or 0, ENGINE)]]
        return isinstance(engine, DecodeEngine) and any(running.key == attempt for running in engine.running)

    def _is_stranded(self, key: Key, worker: int) -> bool:
        """No connection and none to come: everything at this worker has ended or is refused when it arrives."""
        return all(self._is_dead(key[slot], key[dialling]) for slot, dialling in self._halves[worker])

    def _is_dead(self, half: int, dialling: int) -> bool:
        """Of a worker's half of a pair, and prefill's half, by their values' numbers."""
        dead = self._dead.get((half, dialling))
        if dead is None:
            epochs = self.model.values[half].epochs
            dead = not any(epoch.side is Side.UP for epoch in epochs)
            dead = dead and self.model.values[dialling].made >= self.model.config.epochs
            self._dead[(half, dialling)] = dead
        return dead

    def _worker_of(self, name: str, where: list[Any]) -> int | None:
        """Where a progress move takes place, if at one worker."""
        if name == "command":
            spec = self.model.config.requests[int(where[0])]
            return spec.prefill if where[1] == TO_PREFILL else self.model.config.prefills + spec.decode
        return None if name in ("open", "router_lost", "connect") else int(where[0])
