"""Large answers to JSON without holding the event loop for long. ASCII only, as everything that is streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

_SLICE = 256
_DEPTH = 4
_TURN_S = 0.005


async def encode(content: object) -> str:
    """The same text as `json.dumps` with compact separators; other tasks get their turn meanwhile."""
    loop = asyncio.get_running_loop()
    pieces: list[str] = []
    turn_began = loop.time()
    for piece in _pieces(content, 0):
        pieces.append(piece)
        if loop.time() - turn_began > _TURN_S:
            await asyncio.sleep(0)
            turn_began = loop.time()
    return "".join(pieces)


def dumps(content: object) -> str:
    """ASCII only: clients that split lines as Python does would break at U+0085 or U+2028 inside a text."""
    return json.dumps(content, separators=(",", ":"))


def _pieces(value: object, depth: int) -> Iterator[str]:
    """Objects are taken apart down to a depth, long lists into slices."""
    if isinstance(value, dict) and value and depth < _DEPTH:
        for index, (key, item) in enumerate(value.items()):
            yield ("," if index else "{") + dumps(key) + ":"
            yield from _pieces(item, depth + 1)
        yield "}"
    elif isinstance(value, list) and len(value) > _SLICE:
        for start in range(0, len(value), _SLICE):
            yield ("," if start else "[") + dumps(value[start : start + _SLICE])[1:-1]
        yield "]"
    elif isinstance(value, list) and value and depth < _DEPTH:
        for index, item in enumerate(value):
            yield "," if index else "["
            yield from _pieces(item, depth + 1)
        yield "]"
    else:
        yield dumps(value)
