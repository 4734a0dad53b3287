"""Requests and workers that the configuration does not tell apart: states that differ by their names are one state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from itertools import permutations
from operator import itemgetter
from typing import Any

from kv_transfer.frozen_map import FrozenMap, FrozenTable
from tests.transfer.explorer.memo import Memo
from tests.transfer.explorer.move import Key
from tests.transfer.explorer.parts import DecodeEngine, PrefillEngine
from tests.transfer.explorer.world import BUDGET, NEVER, PER_WORKER, Model, epoch_name

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
        self.source[BUDGET] = BUDGET
        for old, new in enumerate(self.workers):
            for part in range(PER_WORKER):
                self.source[model.slot(new, part)] = model.slot(old, part)
        for old, new in enumerate(requests):
            self.source[model.request_slot(new)] = model.request_slot(old)
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
        self._pick: Callable[[Key], Key] = itemgetter(*self.source)
        images = Memo[int, int](lambda number: model.intern(self._component(model.values[number])))
        self._image = images.__getitem__

    def is_smaller(self, key: Key, best: Key) -> bool:
        """Whether the renamed key comes before `best`: mostly decided by one of the first slots."""
        image = self._image
        for slot, other in zip(self.source, best, strict=True):
            number = image(key[slot])
            if number != other:
                return number < other
        return False

    def apply(self, key: Key) -> Key:
        return tuple(map(self._image, self._pick(key)))

    def _component(self, value: Any) -> Any:
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
                admitted=tuple(sorted(renamed.admitted)),
                deadlines=tuple(sorted(renamed.deadlines)),
            )
        if hasattr(renamed, "ended"):
            return renamed._replace(ended=tuple(sorted(renamed.ended)))
        return renamed

    def _rename(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.names.get(value, value)
        if isinstance(value, tuple):
            items = [self._rename(item) for item in value]
            return value.__class__(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, FrozenMap | FrozenTable):
            return value.__class__({self._rename(key): self._rename(item) for key, item in value.items()})
        if is_dataclass(value) and not isinstance(value, type):
            return value.__class__(**{f.name: self._rename(getattr(value, f.name)) for f in fields(value)})
        if value is None or isinstance(value, int | float | Enum):
            return value
        raise TypeError(f"cannot rename {value!r}")


class Symmetry:
    """All renamings that make one state of another. Owned by one search."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.group = self._find(frozenset(range(len(model.config.requests))))
        self._links = [model.pair_slot(*link) for link in sorted(model.config.links)]
        self._is_there = Memo[int, bool](lambda number: bool(model.values[number].made != NEVER))
        self._of_parts = Memo(self._find_of_part)

    def canonical(self, key: Key) -> Key:
        """The smallest of a key's names."""
        best = key
        for renaming in self._group_of(key):
            if renaming.is_smaller(key, best):
                best = renaming.apply(key)
        return best

    def _group_of(self, key: Key) -> list[Renaming]:
        """A part of a world may look like another part, once which faults are planned and which not is over."""
        values = self.model.values
        if not self.model.comes_apart or values[key[BUDGET]].left:
            return self.group
        return self._of_parts[tuple([self._is_there[key[link]] for link in self._links])]

    def _find_of_part(self, present: tuple[bool, ...]) -> list[Renaming]:
        here = {link for link, there in zip(self._links, present, strict=True) if there}
        requests = enumerate(self.model.config.requests)
        kept = (index for index, spec in requests if self.model.pair_slot(spec.prefill, spec.decode) in here)
        return self._find(frozenset(kept))

    def _find(self, kept: frozenset[int]) -> list[Renaming]:
        """All but the identity that make of each request in `kept` one of the configuration."""
        config, found = self.model.config, dict[tuple[tuple[int, ...], ...], Renaming]()
        for prefills in permutations(range(config.prefills)):
            for decodes in permutations(range(config.decodes)):
                for requests in permutations(range(len(config.requests))):
                    if all(self._fits(old, prefills, decodes, requests) for old in kept):
                        acts = (prefills, decodes, tuple(requests[old] for old in sorted(kept)))
                        found.setdefault(acts, Renaming(self.model, prefills, decodes, requests))
        return list(found.values())[1:]

    def _fits(self, old: int, prefills: tuple[int, ...], decodes: tuple[int, ...], requests: tuple[int, ...]) -> bool:
        spec = self.model.config.requests[old]
        moved = replace(spec, prefill=prefills[spec.prefill], decode=decodes[spec.decode])
        return self.model.config.requests[requests[old]] == moved
