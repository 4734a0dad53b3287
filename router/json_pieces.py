"""Large answers to JSON without holding the event loop for long. ASCII only, as everything that is streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from router.turns import Turns

_SLICE = 64
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class EncodedList:
    """A list whose items are JSON already: many small objects would keep the garbage collector busy until the end."""

    items: list[str]


async def encode(content: object) -> str:
    """The same text as `json.dumps` with compact separators; other tasks get their turn meanwhile.

    An EncodedList may be anywhere in the outer four levels of objects and lists.
    """
    turns = Turns()
    pieces: list[str] = []
    for piece in _pieces(content, 0):
        pieces.append(piece)
        await turns.give_way()
    return "".join(pieces)


def dumps(content: object) -> str:
    """ASCII only: clients that split lines as Python does would break at U+0085 or U+2028 inside a text."""
    return json.dumps(content, separators=(",", ":"))


def _pieces(value: object, depth: int) -> Iterator[str]:
    """Objects and lists of such are taken apart down to a depth, other long lists into slices."""
    if isinstance(value, EncodedList):
        yield "["
        for index, item in enumerate(value.items):
            yield "," + item if index else item
        yield "]"
    elif isinstance(value, dict) and value and depth < _DEPTH:
        for index, (key, element) in enumerate(value.items()):
            yield ("," if index else "{") + dumps(key) + ":"
            yield from _pieces(element, depth + 1)
        yield "}"
    elif (
        isinstance(value, list)
        and depth < _DEPTH
        and any(isinstance(item, dict | list | EncodedList) for item in value)
    ):
        for index, element in enumerate(value):
            yield "," if index else "["
            yield from _pieces(element, depth + 1)
        yield "]"
    elif isinstance(value, list) and len(value) > _SLICE:
        for start in range(0, len(value), _SLICE):
            yield ("," if start else "[") + dumps(value[start : start + _SLICE])[1:-1]
        yield "]"
    else:
        yield dumps(value)
