"""Faults that hit several links at once are drawn before a run starts; with `reduce=False` nothing is.

A crash or the passing of time hits every link of a worker in the same moment, so while one may come, those links have
to be walked together. A plan says which of these faults come, in which order; every run follows exactly one plan, so
all plans together are all runs. Only the links of the next planned fault are walked together, all others later.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from tests.transfer.explorer.config import PROCESS, TIME, Config
from tests.transfer.explorer.parts import Budget

if TYPE_CHECKING:
    from tests.transfer.explorer.world import Model

STRIKES = sorted((TIME | PROCESS) - {"suspect"})  # what hits all links of a worker


def shared_workers(config: Config) -> frozenset[int]:
    """Workers with several links."""
    ends = [end for prefill, decode in config.links for end in (prefill, config.prefills + decode)]
    return frozenset(worker for worker in ends if ends.count(worker) > 1)


def budgets(model: Model) -> Iterator[Budget]:
    """One per plan: the faults that are not planned are drawn on the way, from single links."""
    config = model.config
    strikes = [
        (kind, model.names[worker]) for kind in STRIKES if kind in config.kinds for worker in sorted(model.planned)
    ]
    for length in range(config.faults + 1 if strikes else 1):
        for plan in product(strikes, repeat=length):
            yield Budget(config.faults - length, plan)


def spend(model: Model, budget: Budget, worker: int) -> Budget:
    """What is left after a strike at a worker."""
    if worker in model.planned:
        return budget._replace(plan=budget.plan[1:])
    return budget._replace(left=budget.left - 1)


def is_next(model: Model, budget: Budget, kind: str, worker: int) -> bool:
    """Whether the plan lets this strike come now."""
    return bool(budget.plan) and budget.plan[0] == (kind, model.names[worker])


def may_see_time(model: Model, budget: Budget, worker: int) -> bool:
    """Whether a deadline at the worker may still fall due before the end of the run."""
    if worker in model.planned:
        return ("tick", model.names[worker]) in budget.plan
    return "tick" in model.config.kinds and budget.left > 0
