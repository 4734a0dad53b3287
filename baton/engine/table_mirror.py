"""Block tables of running requests as one array, so that a step gathers them in one operation whatever their length.

Owned by the runner; engine thread only. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from baton.engine.request import Request


class TableMirror:
    """Copies of what requests' tables held when they were last gathered; tables only grow.

    A request keeps its row as long as it exists. Both dimensions grow by doubling.
    """

    def __init__(self) -> None:
        self._row_of: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        self._free: list[int] = []
        self._sizes: list[int] = []
        self._blocks = np.zeros((0, 16), dtype=np.int32)

    @property
    def num_rows(self) -> int:
        """Rows that there is room for."""
        return len(self._sizes)

    def gather(self, requests: Sequence[Request], width: int) -> npt.NDArray[np.int32]:
        """The first `width` blocks of each request's table: [len(requests), width]. Beyond a table's end: anything."""
        rows = [self._row(request) for request in requests]
        for row, request in zip(rows, requests, strict=True):
            if len(request.block_table) > self._sizes[row]:
                self._append(row, request.block_table)
        if width > self._blocks.shape[1]:
            self._widen(width)
        found: npt.NDArray[np.int32] = self._blocks[rows, :width]
        return found

    def _row(self, request: Request) -> int:
        row = self._row_of.get(request)
        if row is None:
            if not self._free:
                self._reclaim()
            row = self._free.pop()
            self._row_of[request] = row
            self._sizes[row] = 0
        return row

    def _append(self, row: int, table: list[int]) -> None:
        if len(table) > self._blocks.shape[1]:
            self._widen(len(table))
        start = self._sizes[row]
        self._blocks[row, start : len(table)] = table[start:]
        self._sizes[row] = len(table)

    def _reclaim(self) -> None:
        """Rows of requests that are no more; when those are few, as many new ones as there are."""
        self._free = sorted(set(range(len(self._sizes))) - set(self._row_of.values()), reverse=True)
        if len(self._free) <= len(self._sizes) // 2:
            count = max(16, len(self._sizes))
            self._free = [*reversed(range(len(self._sizes), len(self._sizes) + count)), *self._free]
            self._sizes += [0] * count
            self._blocks = np.concatenate((self._blocks, np.zeros((count, self._blocks.shape[1]), dtype=np.int32)))

    def _widen(self, width: int) -> None:
        added = max(width, 2 * self._blocks.shape[1]) - self._blocks.shape[1]
        self._blocks = np.pad(self._blocks, ((0, 0), (0, added)))
