"""From what the workers noted to figures. Pure: times in seconds of one clock, sizes in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class Row:
    """`at_most`/`at_least`: the bound that `value` has to keep, `wanted` the one hoped for. No bound: told only."""

    work: str
    value: float | None
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    wanted: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_met(self) -> bool | None:
        """Whether the bound is kept; None where there is none."""
        if self.at_most is None and self.at_least is None:
            return None
        if self.value is None:
            return False
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_met": self.is_met}


@dataclass(frozen=True, slots=True)
class HandOver:
    """One hand-over. `prefill`: from the start of its first step to the end of its last layer; `exposed`: from there to
    verified and admissible; `boundary`: from there to decode's step that takes it. `span`: from the first KV that was
    ready to admissible."""

    num_bytes: int
    prefill: float
    exposed: float
    boundary: float
    span: float


def hand_over(sender: dict[str, Any], receiver: dict[str, Any]) -> HandOver:
    """From the logs of one request at its two workers. Raises KeyError or TypeError when a part is missing."""
    written = sender["written"]
    end = max(at for _, at in written)
    admissible = float(receiver["admissible"])
    return HandOver(
        num_bytes=sum(size for size, _ in written),
        prefill=end - sender["events"]["prefill_start"],
        exposed=admissible - end,
        boundary=receiver["events"]["admitted"] - admissible,
        span=admissible - min(at for _, at in written),
    )


def merged_hops(sent: dict[str, Any], taken: dict[str, Any]) -> list[list[Any]]:
    """[milliseconds before the last admission, end, what] of the stamps of both ends (`benchmarks.transfer.hops`)."""
    stamps = [(at, end, what) for end, log in (("prefill", sent), ("decode", taken)) for at, what in log["hops"]]
    last = max((at for at, _, what in stamps if what.startswith("DecodeHalf._admit")), default=0.0)
    return [[round((at - last) * 1e3, 3), end, what] for at, end, what in sorted(stamps)]


Step = Sequence[float]  # (end, seconds, sequences that decoded, prompt tokens)


@dataclass(frozen=True, slots=True)
class StepRatio:
    """Of the steps while something went on, to the idle ones around it. Seconds."""

    ratio: float
    idle_p50: float
    busy_p50: float
    busy_p99: float
    num_idle: int
    num_busy: int


def step_ratio(steps: Sequence[Step], batch: int, busy: tuple[float, float]) -> StepRatio:
    """How much longer a step of `batch` sequences takes within the window `busy`.

    Contexts grow from step to step, so the idle time is a line through the idle steps before and after the window.
    Raises ValueError when there are too few of either kind.
    """
    plain = np.array([step[:2] for step in steps if step[2] == batch and step[3] == 0])
    if len(plain) == 0:
        raise ValueError(f"no step decoded {batch} sequences alone")
    ends, seconds = plain[:, 0], plain[:, 1]
    is_busy = (ends - seconds >= busy[0]) & (ends <= busy[1])
    is_idle = (ends < busy[0]) | (ends - seconds > busy[1])
    if is_busy.sum() < 10 or is_idle.sum() < 10:
        raise ValueError(f"{is_busy.sum()} steps within the window and {is_idle.sum()} around it are too few")
    # A step that met something else on the machine must not tilt the line.
    idle_ends, idle_seconds = ends[is_idle], seconds[is_idle]
    usual = idle_seconds <= 1.5 * np.median(idle_seconds)
    slope, offset = np.polyfit(idle_ends[usual] - busy[0], idle_seconds[usual], 1)
    expected = slope * (ends[is_busy] - busy[0]) + offset
    return StepRatio(
        ratio=float(seconds[is_busy].mean() / expected.mean()),
        idle_p50=float(np.median(idle_seconds)),
        busy_p50=float(np.median(seconds[is_busy])),
        busy_p99=float(np.percentile(seconds[is_busy], 99)),
        num_idle=int(usual.sum()),
        num_busy=int(is_busy.sum()),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the greatest. Raises ValueError when there is none."""
    if not values:
        raise ValueError("nothing was measured")
    return {
        "p50": float(np.percentile(values, 50)),
        "p99": float(np.percentile(values, 99)),
        "max": float(max(values)),
    }


_PHASES = (
    ("written_at", "announced_at"),
    ("announced_at", "posted_at"),
    ("posted_at", "received_at"),
    ("received_at", "verified_at"),
)


def phases(chunks: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Median and p99 microseconds that chunks spent between each two of their times."""
    found = {}
    for earlier, later in _PHASES:
        spent = [chunk[later] - chunk[earlier] for chunk in chunks if None not in (chunk[later], chunk[earlier])]
        if spent:
            name = f"{earlier.removesuffix('_at')} to {later.removesuffix('_at')}"
            found[name] = [round(1e6 * float(np.percentile(spent, share)), 1) for share in (50, 99)]
    return found
