"""Requests and workers that the configuration does not tell apart: states that differ by their names are one state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from itertools import permutations
from typing import Any

from kv_transfer.frozen_map import FrozenMap
from tests.transfer.explorer.config import RequestSpec
from tests.transfer.explorer.parts import DecodeEngine, PrefillEngine, Router
from tests.transfer.explorer.world import BUDGET, PER_WORKER, ROUTER, Model, epoch_name

MAX_EPOCH = 12


class Renaming:
    """One permutation of prefill workers, decode workers and requests that leaves the configuration as it is."""

    def __init__(self, model: Model, prefills: tuple[int, ...], decodes: tuple[int, ...], requests: tuple[int, ...]):
        """Each tuple maps an old number to a new one."""
        self.model = model
        self.requests = requests
        self.workers = (*prefills, *(model.config.prefills + decode for decode in decodes))
        self.names = {model.request_names[old]: model.request_names[new] for old, new in enumerate(self.requests)}
        self.names |= {model.names[old]: model.names[new] for old, new in enumerate(self.workers)}
        self.source = [0] * model.size  # slot of the renamed world <- slot of the world
        self.source[BUDGET], self.source[ROUTER] = BUDGET, ROUTER
        for old, new in enumerate(self.workers):
            for part in range(PER_WORKER):
                self.source[model.slot(new, part)] = model.slot(old, part)
        for old, new in enumerate(requests):
            for role in range(2):
                self.source[model.inbox_slot(new, role)] = model.inbox_slot(old, role)
        for prefill, new_prefill in enumerate(prefills):
            for decode, new_decode in enumerate(decodes):
                for role in range(2):
                    self.source[model.pair_slot(new_prefill, new_decode) + role] = (
                        model.pair_slot(prefill, decode) + role
                    )
                for number in range(1, MAX_EPOCH):
                    old_name = epoch_name(model, prefill, decode, number)
                    self.names[old_name] = epoch_name(model, new_prefill, new_decode, number)
        self._known: dict[int, int] = {}

    def apply(self, key: tuple[int, ...]) -> tuple[int, ...]:
        known, renamed = self._known, []
        for slot in self.source:
            number = key[slot]
            image = known.get(number)
            if image is None:
                image = known[number] = self.model.intern(self._component(self.model.values[number]))
            renamed.append(image)
        return tuple(renamed)

    def _component(self, value: Any) -> Any:
        if isinstance(value, Router):
            return self._router(value)
        renamed = self._rename(value)
        if isinstance(renamed, PrefillEngine):
            return renamed._replace(
                work=tuple(sorted(renamed.work)),
                reported=tuple(sorted(renamed.reported)),
                released=tuple(sorted(renamed.released)),
                deadlines=tuple(sorted(renamed.deadlines)),
            )
        if isinstance(renamed, DecodeEngine):
            return renamed._replace(
                running=tuple(sorted(renamed.running)),
                replies=tuple(sorted(renamed.replies, key=lambda reply: reply[0])),
                reported=tuple(sorted(renamed.reported)),
                deadlines=tuple(sorted(renamed.deadlines)),
            )
        if hasattr(renamed, "ended"):
            return replace(renamed, ended=tuple(sorted(renamed.ended)))
        return renamed

    def _router(self, router: Router) -> Router:
        requests, attached = list(router.requests), list(router.attached)
        for old, new in enumerate(self.requests):
            requests[new] = router.requests[old]
        for old, new in enumerate(self.workers):
            attached[new] = router.attached[old]
        return Router(tuple(requests), tuple(attached))

    def _rename(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.names.get(value, value)
        if isinstance(value, tuple):
            items = [self._rename(item) for item in value]
            return value.__class__(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, FrozenMap):
            return FrozenMap({self._rename(key): self._rename(item) for key, item in value.items()})
        if is_dataclass(value) and not isinstance(value, type):
            return value.__class__(**{f.name: self._rename(getattr(value, f.name)) for f in fields(value)})
        if value is None or isinstance(value, int | float | Enum):
            return value
        raise TypeError(f"cannot rename {value!r}")


def renamings(model: Model) -> list[Renaming]:
    """All permutations but the identity."""
    found = [Renaming(model, *maps) for maps in _automorphisms(model)]
    return [renaming for renaming in found if any(new != old for old, new in renaming.names.items())]


def _automorphisms(model: Model) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    config = model.config
    for prefills in permutations(range(config.prefills)):
        for decodes in permutations(range(config.decodes)):
            for requests in permutations(range(len(config.requests))):
                moved: list[RequestSpec | None] = [None] * len(requests)
                for old, new in enumerate(requests):
                    spec = config.requests[old]
                    moved[new] = replace(spec, prefill=prefills[spec.prefill], decode=decodes[spec.decode])
                hit = (
                    config.hit is None
                    or {
                        prefills[w] if w < config.prefills else config.prefills + decodes[w - config.prefills]
                        for w in config.hit
                    }
                    == config.hit
                )
                if tuple(moved) == config.requests and hit:
                    yield prefills, decodes, requests


def canonical(key: tuple[int, ...], group: list[Renaming]) -> tuple[int, ...]:
    return min([key, *(renaming.apply(key) for renaming in group)]) if group else key
