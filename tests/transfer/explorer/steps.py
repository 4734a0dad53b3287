"""What every step does: its name, its arguments, the function that carries it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.transfer.explorer import fault_steps, link_steps, router, worker_steps
from tests.transfer.explorer.plans import spend
from tests.transfer.explorer.world import BUDGET, World

Step = tuple[Any, ...]


def carry_out(world: World, step: Step) -> None:
    """Change `world` by the step. What it says to the router and to other halves stays in `world.calls`."""
    STEPS[step[0]](world, *step[1:])


def _spend(fault: Callable[..., None]) -> Callable[..., None]:
    def spent(world: World, *arguments: Any) -> None:
        world.values[BUDGET] = world.budget._replace(left=world.budget.left - 1)
        fault(world, *arguments)

    return spent


def _strike(fault: Callable[..., None]) -> Callable[..., None]:
    def struck(world: World, worker: int) -> None:
        world.values[BUDGET] = spend(world.model, world.budget, worker)
        fault(world, worker)

    return struck


STEPS: dict[str, Callable[..., None]] = {
    "open": router.open_request,
    "router_lost": router.on_worker_lost,
    "command": worker_steps.command,
    "compute": worker_steps.compute,
    "reply": worker_steps.reply,
    "decode": worker_steps.decode,
    "connect": link_steps.connect,
    "deliver": link_steps.deliver,
    "packed": link_steps.packed,
    "sent": link_steps.sent,
    "received": link_steps.received,
    "unpacked": link_steps.unpacked,
    "notices": link_steps.notices,
    "destroyed": link_steps.destroyed,
    "time": fault_steps.tick,
    "tick": _strike(fault_steps.tick),
    "crash": _strike(fault_steps.crash),
    "suspect": _spend(link_steps.notices),
    "corrupt": _spend(fault_steps.corrupt),
    "refuse": _spend(fault_steps.refuse),
    "cancel": _spend(fault_steps.cancel),
    "lose": _spend(fault_steps.lose),
    "dup": _spend(fault_steps.dup),
    "swap": _spend(fault_steps.swap),
}
