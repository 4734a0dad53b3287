"""A violation's shortest way, as a sequence that a person can read."""

from __future__ import annotations

from typing import Any

from tests.transfer.explorer.effects import Effects
from tests.transfer.explorer.move import Key, Move
from tests.transfer.explorer.moves import FAULTS, Moves
from tests.transfer.explorer.parts import Violation
from tests.transfer.explorer.slices import Slices
from tests.transfer.explorer.steps import Step
from tests.transfer.explorer.symmetry import Symmetry
from tests.transfer.explorer.world import Model, epoch_name


class Replay:
    """Finds the moves that lead along a path of canonical keys, under one set of names."""

    def __init__(self, moves: Moves, effects: Effects, slices: Slices, symmetry: Symmetry) -> None:
        self.moves, self.effects, self.slices, self.symmetry = moves, effects, slices, symmetry
        self.model = moves.model

    def lines(self, path: list[Key], last: Move | None) -> list[str]:
        key = path[0]
        lines = []
        for number, target in enumerate(path[1:], 1):
            move, after = self._move_to(key, target)
            lines.append(f"{number:3}. {describe(self.model, key, move.step)}")
            key = after
        if last is None:
            return [*lines, "     ... and nothing else happens by itself"]
        wrong = self._wrong_move(key, last)
        return [*lines, f"{len(lines) + 1:3}. {describe(self.model, key, wrong.step)}   <- here"]

    def _all_moves(self, key: Key) -> list[Move]:
        progress, faults = self.moves.of(key, self.model.config.epochs)
        return progress + faults

    def _move_to(self, key: Key, target: Key) -> tuple[Move, Key]:
        for move in self._all_moves(key):
            try:
                after = self.effects.take(key, move)
            except Violation:
                continue
            for part in self.slices.of(after) if self.model.comes_apart else [after]:
                if self.symmetry.canonical(part) == target:
                    return move, part
        raise AssertionError("the trace cannot be replayed")

    def _wrong_move(self, key: Key, last: Move) -> Move:
        """The move that goes wrong here: under this trace's names it may not be `last` itself."""
        for move in self._all_moves(key):
            if move.name == last.name:
                try:
                    self.effects.take(key, move)
                except Violation:
                    return move
        return last


def describe(model: Model, key: Key, step: Step) -> str:
    name, *rest = step
    text = _where(model, key, name, rest)
    return f"FAULT {text}" if name in FAULTS else text


def _where(model: Model, key: Key, name: str, rest: list[Any]) -> str:
    if name in ("open", "cancel"):
        return f"router: {name} r{rest[0]}"
    if name == "command":
        command = model.values[key[model.inbox_slot(*rest)]][0]
        return f"{'decode' if rest[1] else 'prefill'} worker of r{rest[0]} takes {command.__class__.__name__}"
    if name in ("lose", "dup", "swap"):
        if rest[0] == "inbox":
            return f"{name} in the inbox of r{rest[1]}'s {'decode' if rest[2] else 'prefill'} worker"
        return f"{name} on {epoch_name(model, *rest[2:5])} to {model.names[rest[1]]}"
    if name == "connect":
        return f"{model.names[rest[0]]} connects to {model.names[model.config.prefills + rest[1]]}"
    if len(rest) == 4:
        return f"{model.names[rest[0]]}: {name} on {epoch_name(model, *rest[1:])}{_message(model, key, name, rest)}"
    return f"{model.names[rest[0]]}: {name} {' '.join(_plain(item) for item in rest[1:])}".rstrip()


def _message(model: Model, key: Key, name: str, rest: list[Any]) -> str:
    if name != "deliver":
        return ""
    half = model.values[key[model.half_slot(*rest[:3])]]
    return f" {next(epoch for epoch in half.epochs if epoch.number == rest[3]).inbound[0]}"


def _plain(item: Any) -> str:
    key = getattr(item, "key", item)
    return f"{key.request_id}/{key.attempt}" if hasattr(key, "request_id") else str(key)
