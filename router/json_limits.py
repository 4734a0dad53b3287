"""How much structure a request body may have. Building a million little lists would hold the event loop for long."""

from __future__ import annotations

import re
from typing import Final

from baton.common.errors import InvalidRequest

MAX_CONTAINERS: Final = 16_384
_MAX_QUOTES: Final = 2**18
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def check_structure(body: bytes) -> None:
    """Raise InvalidRequest if the body has more arrays and objects than any request needs. Brackets in text are free.

    Counting bytes is cheap; only a body that looks suspicious has its strings taken out and is counted again.
    """
    if _num_containers(body) <= MAX_CONTAINERS:
        return
    if body.count(b'"') > _MAX_QUOTES or _num_containers(_STRING.sub(b"", body)) > MAX_CONTAINERS:
        message = f"the body has more than {MAX_CONTAINERS} arrays and objects, or too many strings beside them"
        raise InvalidRequest(message, None, "invalid_json")


def _num_containers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")
