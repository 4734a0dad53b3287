"""What the two ends of the hand-over protocol share besides messages, events and slots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

STALL_TIMEOUT_S = 10.0  # no progress of an outstanding chunk for this long tears the epoch down (invariant I4)
ENDED_REMEMBERED = 256  # ended attempts whose repeated command is recognised


class Counters(NamedTuple):
    """For metrics. `live`: leases or attempts that still hold blocks; the others count staging slots."""

    live: int
    slots_in_flight: int
    slots_quarantined: int


def earliest(times: Iterable[float]) -> float | None:
    return min(times, default=None)
