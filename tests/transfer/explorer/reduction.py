"""Which of the possible moves are enough: partial-order reduction, argued in README.md."""

from __future__ import annotations

from typing import Any

from kv_transfer.events import AttemptKey
from kv_transfer.messages import Abort, ChunksDone, Committed, Finish
from tests.transfer.explorer.moves import Key, Move, Moves
from tests.transfer.explorer.parts import CancelCommand, DecodeEngine, Side
from tests.transfer.explorer.world import BUDGET, ENGINE, TO_PREFILL, Model


class Reduction:
    """Owned by one search. Stateless but for what the configuration decides once."""

    def __init__(self, moves: Moves) -> None:
        model, config = moves.model, moves.model.config
        self.moves = moves
        self.model = model
        self.enabled, self.fine = config.reduce, config.fine
        demand = sum(request.chunks for request in config.requests) * config.attempts
        self.blocks_never_lack = demand <= config.decode_blocks and demand <= config.prefill_blocks
        self.credits_never_lack = demand <= config.window
        self.groups = self._group(model)

    def enough(self, key: Key, progress: list[Move], faults: list[Move]) -> list[Move]:
        everything = progress + faults
        if not self.fine:
            at_once = next((move for move in progress if move.step[0] == "sent"), None)
            if at_once is not None:
                return [at_once]
        if not self.enabled or not progress:
            return everything
        if not self.model.values[key[BUDGET]].left:
            harmless = next((move for move in progress if self._is_harmless(key, move)), None)
            if harmless is not None:
                return [harmless]
        if not self.blocks_never_lack:
            return everything
        group = min(self.groups[move.cluster] for move in progress)
        return [move for move in everything if self.groups[move.cluster] == group]

    def _group(self, model: Model) -> dict[int, int]:
        """Links that one fault can hit together, because a worker that may be hit has both, belong together."""
        config = model.config
        groups = {model.pair_slot(*link): model.pair_slot(*link) for link in config.links}
        for worker in filter(config.may_hit, range(model.num_workers)):
            together = {groups[model.pair_slot(*link)] for link in config.links if worker in model.ends(*link)}
            groups = {link: min(together) if group in together else group for link, group in groups.items()}
        return groups

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
        return worker is not None and self.blocks_never_lack and self._is_stranded(key, worker)

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
        for slot in self.model.halves_of(worker):
            prefill_half = slot if self.model.is_prefill(worker) else slot - 1
            if self.model.values[key[prefill_half]].made < self.model.config.epochs:
                return False
            if any(epoch.side is Side.UP for epoch in self.model.values[key[slot]].epochs):
                return False
        return True

    def _worker_of(self, name: str, where: list[Any]) -> int | None:
        """Where a progress move takes place, if at one worker."""
        if name == "command":
            spec = self.model.config.requests[int(where[0])]
            return spec.prefill if where[1] == TO_PREFILL else self.model.config.prefills + spec.decode
        return None if name in ("open", "router_lost", "connect") else int(where[0])
