"""What must hold when nothing moves any more, and after timers have fired and the router has given up.

`Endings` runs a world on without faults, in one fixed order. Together with the search, which takes every order until
nothing moves, it shows that every attempt ends and that nothing stays leased, quarantined or in flight.
"""

from __future__ import annotations

from itertools import product

from kv_transfer.decode_state import LeasePhase
from kv_transfer.protocol import counters, next_deadline
from tests.transfer.explorer import router
from tests.transfer.explorer.checks import require
from tests.transfer.explorer.effects import Effects
from tests.transfer.explorer.move import Key
from tests.transfer.explorer.moves import Moves
from tests.transfer.explorer.parts import Phase, PrefillEngine, RouterRequest
from tests.transfer.explorer.world import World

LIMIT = 5000  # steps of one continuation: far more than any that ends
PROBE = 90  # attempt number of a probe
EXTRA_EPOCHS = 3  # connections that a continuation may make beyond what the search may


class Endings:
    """Checks of quiet states. Owned by one search, whose moves it shares."""

    def __init__(self, moves: Moves, effects: Effects) -> None:
        self.moves, self.effects = moves, effects
        self.model = moves.model
        self.max_epochs = self.model.config.epochs
        self._probed: set[Key] = set()

    def check(self, key: Key) -> None:
        """`key` is quiet: nothing can happen but a fault or time."""
        check_quiet(self.model.world(key))
        final = self._run_out(key)
        if final not in self._probed:
            self._probed.add(final)
            self._probe(final)

    def _settle(self, key: Key, max_epochs: int) -> Key:
        """Let everything happen that happens by itself, in a fixed order."""
        for _ in range(LIMIT):
            progress, _ = self.moves.of(key, max_epochs)
            if not progress:
                return key
            key = self.effects.take(key, progress[0])
        require(False, "I3: the system never comes to rest")
        return key

    def _run_out(self, key: Key) -> Key:
        """Deadlines fall due, then the router gives up what it has heard nothing of."""
        key = self._timers(key)
        world = self.model.world(key)
        for index, request in enumerate(world.requests):
            if router.active(request):
                require(world.budget.router_lossy, f"I2: only the router's own timer ends r{index}")
                router.abandon(world, index, None, Phase.CANCELLED)
        key = self._timers(self._settle(world.key(), self.max_epochs))
        check_clean(self.model.world(key), "after all timers")
        return key

    def _timers(self, key: Key) -> Key:
        for _ in range(LIMIT):
            world = self.model.world(key)
            workers = range(self.model.num_workers)
            waiting = next((worker for worker in workers if next_deadline(world.state(worker)) is not None), None)
            if waiting is None:
                return key
            after = self.effects.take(key, self.moves.time(waiting))
            require(after != key, f"I3: {self.model.names[waiting]} has a deadline that never passes")
            key = self._settle(after, self.max_epochs)
        require(False, "I3: timers fire for ever")
        return key

    def _probe(self, key: Key) -> None:
        """After everything, every request must succeed when tried anew: no transient fault outlives its cause."""
        limit = self.max_epochs + EXTRA_EPOCHS
        world = self.model.world(self._settle(key, limit))
        fresh = RouterRequest(attempt=PROBE)
        present = [request.phase is not Phase.ABSENT for request in world.requests]
        world.values[self.model.first_request :] = [
            fresh if here else request for here, request in zip(present, world.requests, strict=True)
        ]
        after = self.model.world(self._settle(world.key(), limit))
        for index, request in enumerate(after.requests):
            require(
                request.phase in (Phase.OK, Phase.ABSENT), f"r{index} fails when tried anew after all faults: {request}"
            )


def check_quiet(world: World) -> None:
    """Unless messages were lost, everything is over without any timer."""
    budget = world.budget
    if not budget.peer_lossy:
        check_told(world)
    if not budget.peer_lossy and not budget.router_lossy:
        for index, request in enumerate(world.requests):
            require(not router.active(request), f"I2: nobody told the router how r{index} ended")
        check_clean(world, "without timers")
    if budget.left + len(budget.plan) == world.model.config.faults:
        for request in world.requests:
            fine = request.phase is Phase.ABSENT or (request.phase, request.attempt) == (Phase.OK, 0)
            require(fine, "a request fails though nothing went wrong")


def check_told(world: World) -> None:
    """An end at one side is known at the other as long as their connection lives."""
    config, model = world.model.config, world.model
    for prefill, decode in product(range(config.prefills), range(config.decodes)):
        at_prefill, at_decode = world.state(prefill), world.state(config.prefills + decode)
        here, there = model.names[prefill], model.names[config.prefills + decode]
        epoch = at_prefill.link(there).epoch
        if epoch is None or epoch != at_decode.link(here).epoch:
            continue
        for lease in at_decode.leases_of(here):
            over = lease.key in at_prefill.ended and lease.phase is not LeasePhase.DRAINING
            require(not over, f"I2: decode was not told that {lease.key} is over at prefill")
        for attempt in at_prefill.attempts_of(there):
            require(
                attempt.key not in at_decode.ended, f"I2: prefill was not told that {attempt.key} is over at decode"
            )


def check_clean(world: World, when: str) -> None:
    for worker in range(world.model.num_workers):
        name, state, engine = world.model.names[worker], world.state(worker), world.engine(worker)
        held = engine.work if isinstance(engine, PrefillEngine) else (*engine.reserved, *engine.running)
        require(counters(state) == (0, 0, 0), f"I4: {when}, {name} still counts {counters(state)}")
        require(next_deadline(state) is None, f"I3: {when}, {name} still waits for something")
        require(not held, f"I4: {when}, the engine of {name} still holds {held}")
    for slot in range(world.model.first_inbox, world.model.first_request):
        require(not world.values[slot], f"{when}, a command is never taken: {world.values[slot]}")
