"""Captured CUDA graphs that share one pool of memory. Imported by name, on a GPU only."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

Cut = Callable[[], None]
Compute = Callable[[Cut], torch.Tensor]  # what is launched before and after a call of its argument are two graphs


def _uncut() -> None:
    pass


def _say_nothing(_: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Captured:
    """`output`: what the captured function returned. In the graphs' memory, valid until any graph runs again."""

    graphs: tuple[torch.cuda.CUDAGraph, ...]
    output: torch.Tensor

    def replay(self, after: Callable[[int], None] = _say_nothing) -> None:
        """Launch all graphs, and call `after` with its index when each is launched."""
        for index, graph in enumerate(self.graphs):
            graph.replay()
            after(index)


class GraphPool:
    """Graphs of one pool must not run side by side. Engine thread, or its builder before that."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, compute: Compute) -> Captured:
        """`compute` runs once before: kernels are compiled and libraries choose theirs, which a capture must not see.
        Capture the largest first: what it takes is then enough for the others.
        """
        return self._capture_into(self._pool, compute)

    def measure(self, largest: Iterable[Compute], count: int) -> int:
        """Bytes that `count` captures take, of which these are the largest: the first takes the pool's memory, the
        others what each further one adds. Nothing of it is kept.
        """
        # Of its own: torch takes a pool for dead, and refuses it, when the last of its graphs is gone.
        pool = torch.cuda.graph_pool_handle()
        free, kept = [self._free_bytes()], []
        for compute in largest:
            kept.append(self._capture_into(pool, compute))
            free.append(self._free_bytes())
        first, *others = (before - after for before, after in pairwise(free))
        return max(0, first) + max(0, *others, 0) * (count - 1)

    def _capture_into(self, pool: Any, compute: Compute) -> Captured:
        compute(_uncut)
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()
        graphs: list[torch.cuda.CUDAGraph] = []

        def begin() -> None:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            graphs.append(graph)

        def cut() -> None:
            graphs[-1].capture_end()
            begin()

        with torch.cuda.stream(self._stream):
            begin()
            try:
                output = compute(cut)
            except BaseException:
                with suppress(RuntimeError):  # the first error counts; this one may follow from it
                    graphs[-1].capture_end()
                raise
            graphs[-1].capture_end()
        return Captured(tuple(graphs), output)

    def _free_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.mem_get_info(self._device)[0]
