"""Worlds that have come apart: links between which nothing is left to happen are walked each by itself.

A step of one link neither reads nor changes what belongs to another; `Frame` checks this of every step when it is first
carried out. So once no planned fault is left that hits two links together, all that can still happen is what can happen
to each of them alone, and all that is checked is checked of each alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from operator import getitem
from typing import Any

from kv_transfer.frozen_map import FrozenMap, FrozenTable
from kv_transfer.link_events import AttemptKey
from kv_transfer.prefill_state import PrefillState
from tests.transfer.explorer.memo import Memo
from tests.transfer.explorer.move import Key
from tests.transfer.explorer.parts import (
    Budget,
    DecodeEngine,
    DecodeHalf,
    Phase,
    PrefillEngine,
    PrefillHalf,
    Reserved,
    RouterRequest,
    Running,
)
from tests.transfer.explorer.world import BUDGET, ENGINE, FIRST_WORKER, NEVER, PER_WORKER, Model

Links = frozenset[int]  # by the slot of prefill's half


class Slices:
    """Owned by one search."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._links = [model.pair_slot(*link) for link in sorted(model.config.links)]
        self.links: Links = frozenset(self._links)
        self._links_at = [self._find_links(worker) for worker in range(model.num_workers)]
        self._projections = Memo(self._projection)
        self._parts_of = Memo(self._find_parts)

    def of(self, key: Key) -> list[Key]:
        """The world, or the parts that it has come apart into."""
        parts = self._parts_of[tuple([key[slot] for slot in (BUDGET, *self._links)])]
        return [self._part(key, *part) for part in parts] if len(parts) > 1 else [key]

    def _find_parts(self, numbers: Key) -> list[tuple[Links, int]]:
        """The links of each part, and its budget, by the numbers of the whole budget and of prefill's halves."""
        budget: Budget = self.model.values[numbers[0]]
        halves = zip(self._links, numbers[1:], strict=True)
        alive = frozenset(link for link, number in halves if self.model.values[number].made != NEVER)
        return [(links, self._budget(budget, links)) for links in self._together(alive, budget)]

    def _budget(self, budget: Budget, links: Links) -> int:
        struck = any(links & self.links_at(self.model.workers[name]) for _, name in budget.plan)
        return self.model.intern(budget if struck else budget._replace(plan=()))

    def _together(self, links: Links, budget: Budget) -> list[Links]:
        """Links that a planned fault hits together belong together."""
        parts = [frozenset({link}) for link in sorted(links)]
        for _, name in budget.plan:
            hit = links & self.links_at(self.model.workers[name])
            joined = [part for part in parts if part & hit]
            parts = [part for part in parts if not part & hit] + [frozenset[int]().union(*joined)]
        return parts

    def links_at(self, worker: int) -> Links:
        return self._links_at[worker]

    def _find_links(self, worker: int) -> Links:
        model = self.model
        return frozenset(model.pair_slot(*link) for link in model.config.links if worker in model.ends(*link))

    def _part(self, key: Key, links: Links, budget: int) -> Key:
        part = list(self.project(key, links))
        part[BUDGET] = budget
        return tuple(part)

    # ---- projections

    def project(self, key: Key, links: Links) -> Key:
        """What belongs to these links. Everything else looks as if it had never been there."""
        return tuple(map(getitem, self._projections[links], key))

    def _projection(self, links: Links) -> list[Memo[int, int]]:
        return [Memo(partial(self._image, slot, links)) for slot in range(self.model.size)]

    def _image(self, slot: int, links: Links, number: int) -> int:
        return self.model.intern(self._component(slot, self.model.values[number], links))

    def _component(self, slot: int, value: Any, links: Links) -> Any:
        model = self.model
        if slot == BUDGET:
            return value
        if slot < model.first_pair:
            worker, part = divmod(slot - FIRST_WORKER, PER_WORKER)
            return self._engine(worker, value, links) if part == ENGINE else self._protocol(worker, value, links)
        if slot < model.first_inbox:
            role = (slot - model.first_pair) % PER_WORKER
            absent = DecodeHalf(()) if role else PrefillHalf(NEVER, ())
            return value if slot - role in links else absent
        if slot < model.first_request:
            return value if self._belongs((slot - model.first_inbox) // 2, links) else ()
        return value if self._belongs(slot - model.first_request, links) else RouterRequest(phase=Phase.ABSENT)

    def _belongs(self, request: int, links: Links) -> bool:
        spec = self.model.config.requests[request]
        return self.model.pair_slot(spec.prefill, spec.decode) in links

    def _keeps(self, key: Any, links: Links) -> bool:
        return self._belongs(self.model.request_index[key.request_id], links)

    def _protocol(self, worker: int, state: Any, links: Links) -> Any:
        others = (other for other in range(self.model.num_workers) if links & self._between(worker, other))
        if not links & self.links_at(worker):
            return self.model.values[self.model.fresh_protocol(worker)]
        peers = {self.model.names[other] for other in others}
        kept = state._replace(
            links=FrozenMap({peer: link for peer, link in state.links.items() if peer in peers}),
            ended=tuple(key for key in state.ended if self._keeps(key, links)),
        )
        if isinstance(kept, PrefillState):
            attempts = {key: attempt for key, attempt in kept.attempts.items() if attempt.peer in peers}
            waiting = {peer: keys for peer, keys in kept.waiting.items() if peer in peers}
            aliases: dict[Hashable, AttemptKey] = {attempt.alias: key for key, attempt in attempts.items()}
            return kept._replace(
                attempts=FrozenTable(attempts), aliases=FrozenTable(aliases), waiting=FrozenMap(waiting)
            )
        leases = {number: lease for number, lease in kept.leases.items() if lease.peer in peers}
        numbers: dict[Hashable, int] = {lease.key: number for number, lease in leases.items()}
        return kept._replace(leases=FrozenTable(leases), aliases=FrozenTable(numbers))

    def _between(self, worker: int, other: int) -> Links:
        return self.links_at(worker) & self.links_at(other) if worker != other else frozenset()

    def _engine(self, worker: int, engine: PrefillEngine | DecodeEngine, links: Links) -> PrefillEngine | DecodeEngine:
        if not links & self.links_at(worker):
            return self.model.fresh_engine(worker, 0)
        kept: Any = engine._replace(
            reported=tuple(key for key in engine.reported if self._keeps(key, links)),
            deadlines=tuple(item for item in engine.deadlines if self._keeps(item[0], links)),
        )
        return self._prefill(kept, links) if isinstance(kept, PrefillEngine) else self._decode(kept, links)

    def _prefill(self, engine: PrefillEngine, links: Links) -> PrefillEngine:
        gone = [work for work in engine.work if not self._keeps(work.key, links)]
        return engine._replace(
            free=engine.free + sum(self.model.spec(work.key).num_blocks for work in gone if work.holds),
            work=tuple(work for work in engine.work if work not in gone),
            released=tuple(key for key in engine.released if self._keeps(key, links)),
        )

    def _decode(self, engine: DecodeEngine, links: Links) -> DecodeEngine:
        held_by: tuple[Reserved | Running, ...] = (*engine.reserved, *engine.running)
        gone = [held for held in held_by if not self._keeps(held.key, links)]
        blocks = {block for held in gone for block in held.blocks} | set(engine.elsewhere)
        return engine._replace(
            contents=tuple(None if block in blocks else what for block, what in enumerate(engine.contents)),
            reserved=tuple(held for held in engine.reserved if held not in gone),
            running=tuple(held for held in engine.running if held not in gone),
            replies=tuple(reply for reply in engine.replies if self._keeps(reply[0], links)),
            admitted=tuple(item for item in engine.admitted if self._keeps(item[0], links)),
            elsewhere=tuple(sorted(blocks)),
        )
