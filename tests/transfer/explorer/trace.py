"""A violation's shortest way, as a sequence that a person can read."""

from __future__ import annotations

from typing import Any

from tests.transfer.explorer.moves import FAULTS, Key, Move, Moves
from tests.transfer.explorer.parts import Violation
from tests.transfer.explorer.steps import Step
from tests.transfer.explorer.symmetry import Symmetry
from tests.transfer.explorer.world import Model, epoch_name


def readable(moves: Moves, symmetry: Symmetry, path: list[Key], last: Move | None) -> list[str]:
    """Replay canonical keys from the first under one set of names, and describe each step."""
    key = path[0]
    lines = []
    for number, target in enumerate(path[1:], 1):
        move, after = _move_to(moves, key, target, symmetry)
        lines.append(f"{number:3}. {describe(moves.model, key, move.step)}")
        key = after
    if last is None:
        return [*lines, "     ... and nothing else happens by itself"]
    wrong = _wrong_move(moves, key, last)
    return [*lines, f"{len(lines) + 1:3}. {describe(moves.model, key, wrong.step)}   <- here"]


def _all_moves(moves: Moves, key: Key) -> list[Move]:
    progress, faults = moves.of(key, moves.model.config.epochs)
    return progress + faults


def _move_to(moves: Moves, key: Key, target: Key, symmetry: Symmetry) -> tuple[Move, Key]:
    for move in _all_moves(moves, key):
        try:
            after = moves.take(key, move)
        except Violation:
            continue
        for part in moves.slices.of(after) if moves.model.comes_apart else [after]:
            if symmetry.canonical(part) == target:
                return move, part
    raise AssertionError("the trace cannot be replayed")


def _wrong_move(moves: Moves, key: Key, last: Move) -> Move:
    """The move that goes wrong here: under this trace's names it may not be `last` itself."""
    for move in _all_moves(moves, key):
        if move.step[0] == last.step[0]:
            try:
                moves.take(key, move)
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
