"""Several worlds at once, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager

from tests.transfer.explorer.config import Config
from tests.transfer.explorer.search import Result, explore


@contextmanager
def walking(configs: Iterable[Config], jobs: int) -> Iterator[dict[str, Future[Result]]]:
    """Starts to walk the worlds, `jobs` at a time, in the order given. Results come by name."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield {config.name: pool.submit(explore, config) for config in configs}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
