"""Goodput: the highest rate at which a given share of the requests meets the SLOs, found by bisection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Probe:
    """One rate that was tried. `share` is of the requests in SLO; an invalid probe measured the client."""

    rate: float
    share: float
    valid: bool

    def passes(self, share: float) -> bool:
        return self.valid and self.share >= share


@dataclass
class Search:
    """Goodput lies between `passed` and `failed`; None where no rate passed or none failed."""

    share: float
    passed: float | None = None
    failed: float | None = None
    probes: list[Probe] = field(default_factory=list)

    @property
    def limited_by_client(self) -> bool:
        """The lowest rate that failed did so because the client could not keep up: the server's goodput is higher."""
        return any(probe.rate == self.failed and not probe.valid for probe in self.probes)

    def add(self, probe: Probe) -> bool:
        """Narrow the interval; returns whether the probe passed."""
        self.probes.append(probe)
        if probe.passes(self.share):
            self.passed = probe.rate
            return True
        self.failed = probe.rate
        return False


async def search_goodput(
    probe: Callable[[float], Awaitable[Probe]], low: float, high: float, share: float, tolerance: float
) -> Search:
    """Bisect between `low` and `high` requests/s until the interval is within `tolerance` of its upper end.

    Stops at once when `low` fails or `high` passes: the interval then does not hold the goodput, and says so.
    """
    search = Search(share)
    if not search.add(await probe(low)) or search.add(await probe(high)):
        return search
    while search.failed is not None and search.passed is not None:
        if search.failed - search.passed <= tolerance * search.failed:
            break
        search.add(await probe((search.passed + search.failed) / 2))
    return search
