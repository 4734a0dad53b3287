"""The worlds that are walked: STANDARD in CI, DEEP at leisure."""

from __future__ import annotations

from tests.transfer.explorer.config import ALL_FAULTS, Config, RequestSpec

TWO_PAIRS = (RequestSpec(0, 0, 1), RequestSpec(0, 1, 1), RequestSpec(1, 1, 1))


def one(name: str, chunks: int, faults: int, **more: int) -> Config:
    """One request that may be tried twice, over at most two connections, every completion by itself."""
    return Config(name, 1, 1, (RequestSpec(0, 0, chunks, **more),), faults, attempts=2, epochs=2)


def two(name: str, chunks: int, faults: int, fine: bool) -> Config:
    """Two requests on one connection, each tried once."""
    return Config(name, 1, 1, (RequestSpec(0, 0, chunks),) * 2, faults, attempts=1, epochs=1, fine=fine)


def pairs(name: str, faults: int, kinds: frozenset[str] = ALL_FAULTS, fine: bool = False) -> Config:
    """Three requests over two prefill and two decode workers, two of which have two connections."""
    return Config(name, 2, 2, TWO_PAIRS, faults, kinds, attempts=1, epochs=1, fine=fine)


STANDARD = (  # the longest first
    two("two-requests", chunks=2, faults=1, fine=False),
    pairs("pairs", faults=2),
    one("cached", chunks=0, faults=2, cached=1),
    one("one-chunk", chunks=1, faults=1),
    one("finish", chunks=1, faults=1, tokens=1),
)
DEEP = (
    pairs("pairs-fine", faults=2, fine=True),
    one("two-faults", chunks=1, faults=2),
    one("two-chunks", chunks=2, faults=1),
    two("two-requests-fine", chunks=1, faults=1, fine=True),
)
