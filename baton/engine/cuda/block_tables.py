"""Block tables that stay on the device and learn of new blocks only. Owned by the decode graphs.

A request has a row from its first decode until it has ended; what has to be sent per step is what was allocated since.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from baton.engine.request import Phase, Request


class BlockTableRows:
    """Which request has which row, and what the device does not know yet. Engine thread only; no torch."""

    def __init__(self, max_rows: int, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._free = list(reversed(range(max_rows)))
        self._row_of: dict[str, int] = {}
        self._owners: dict[str, Request] = {}
        self._sent = [0] * max_rows

    def rows_of(self, requests: Iterable[Request]) -> list[int]:
        """Each request's row; a new one is taken where it has none. The rows of ended requests are used again."""
        rows, owners = self._row_of, self._owners
        return [rows[r.request_id] if owners.get(r.request_id) is r else self._take(r) for r in requests]

    def news(self, requests: Iterable[Request]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Flat indices and blocks that were added to these requests' tables since they were last asked about."""
        indices: list[int] = []
        blocks: list[int] = []
        for request in requests:
            row = self._row_of[request.request_id]
            table, sent = request.block_table, self._sent[row]
            if len(table) > sent:
                start = row * self._max_blocks
                indices.extend(range(start + sent, start + len(table)))
                blocks.extend(table[sent:])
                self._sent[row] = len(table)
        return np.array(indices, dtype=np.int64), np.array(blocks, dtype=np.int32)

    def _take(self, request: Request) -> int:
        if request.request_id in self._owners:  # an earlier request had this id, and its row is what it leaves
            self._release(request.request_id)
        if not self._free:
            self._reclaim()
        row = self._free.pop()
        self._row_of[request.request_id] = row
        self._owners[request.request_id] = request
        self._sent[row] = 0
        return row

    def _reclaim(self) -> None:
        for request_id in [name for name, owner in self._owners.items() if owner.phase is not Phase.RUNNING]:
            self._release(request_id)

    def _release(self, request_id: str) -> None:
        self._free.append(self._row_of.pop(request_id))
        del self._owners[request_id]
