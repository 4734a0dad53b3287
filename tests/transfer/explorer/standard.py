"""The worlds that are walked: STANDARD takes at most five minutes of one core each, DEEP more."""

from __future__ import annotations

from tests.transfer.explorer.config import ALL_FAULTS, Config, RequestSpec

TWO_PAIRS = (RequestSpec(0, 0, 1), RequestSpec(0, 1, 1), RequestSpec(1, 1, 1))
P0, P1, D0, D1 = range(4)


def one(name: str, chunks: int, faults: int, **more: int) -> Config:
    """One request that may be tried twice, over at most two connections, every completion by itself."""
    return Config(name, 1, 1, (RequestSpec(0, 0, chunks, **more),), faults, attempts=2, epochs=2)


def two(name: str, chunks: int, faults: int, fine: bool) -> Config:
    """Two requests on one connection, each tried once."""
    return Config(name, 1, 1, (RequestSpec(0, 0, chunks),) * 2, faults, attempts=1, epochs=1, fine=fine)


def pairs(name: str, hit: set[int], faults: int, kinds: frozenset[str] = ALL_FAULTS) -> Config:
    """Three requests over two prefill and two decode workers; crashes and time strike the workers in `hit` only."""
    return Config(name, 2, 2, TWO_PAIRS, faults, kinds, attempts=1, epochs=1, fine=False, hit=frozenset(hit))


QUICK = (
    one("one-chunk", chunks=1, faults=1),
    one("cached", chunks=0, faults=2, cached=1),
    one("finish", chunks=1, faults=1, tokens=1),
    pairs("pairs-quick", hit={P0, P1, D0}, faults=1),
)
STANDARD = (
    *QUICK,
    one("two-chunks", chunks=2, faults=1),
    one("two-faults", chunks=1, faults=2),
    two("two-requests", chunks=2, faults=1, fine=False),
    pairs("pairs-links", hit=set(), faults=2),
    pairs("pairs-crash", hit={P0, P1, D0}, faults=2, kinds=ALL_FAULTS - {"tick"}),
)
DEEP = (
    two("two-requests-fine", chunks=1, faults=1, fine=True),
    pairs("pairs-tick", hit={P0, P1, D0}, faults=2, kinds=ALL_FAULTS - {"crash"}),
    pairs("pairs-crash-decode", hit={P1, D0, D1}, faults=2, kinds=ALL_FAULTS - {"tick"}),
    pairs("pairs-all", hit={P0, P1, D0, D1}, faults=2),
)
