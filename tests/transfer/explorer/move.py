"""A step that may be taken, what it calls, and what is remembered of both."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

from tests.transfer.explorer.steps import Step

Key = tuple[int, ...]
Changes = tuple[tuple[int, int], ...]  # slots, and the numbers of the values that they get


class Call:
    """What a step tells the router or another half of a pair. `heard`: what follows, by what lies in the footprint."""

    __slots__ = ("heard", "pick", "what")

    def __init__(self, what: tuple[Any, ...], footprint: tuple[int, ...]) -> None:
        self.what = what
        self.pick: Callable[[Any], Any] = itemgetter(*footprint)
        self.heard: dict[Any, tuple[Changes, tuple[Call, ...]]] = {}


class Effect(NamedTuple):
    """What a step changes in its footprint, whom it calls, whether the protocol stays idle."""

    changes: Changes
    calls: tuple[Call, ...]
    idle: bool


class Move:
    """A step that starts from a component. `cluster`: the pair slot that it belongs to.

    `worker`: where it takes place, if at one worker. `head`: the message or command that it delivers. `effects`: what
    follows, by what lies in the footprint, which is at least two slots.
    """

    __slots__ = ("cluster", "effects", "footprint", "head", "name", "pick", "step", "worker")

    def __init__(
        self, step: Step, footprint: tuple[int, ...], cluster: int, worker: int | None = None, head: Any = None
    ) -> None:
        self.step = step
        self.name: str = step[0]
        self.footprint = footprint
        self.cluster = cluster
        self.worker = worker
        self.head = head
        self.pick: Callable[[Key], Key] = itemgetter(*footprint)
        self.effects: dict[Key, Effect] = {}
