"""Immutable mappings for protocol states: a change makes a new one and leaves the old one as it is.

Used by the pure state machines only. Both compare and hash by their entries, whatever their past. Entries come in no
order that means anything: whoever acts on several sorts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Generic, NoReturn, TypeVar

K = TypeVar("K")
V = TypeVar("V")
BUCKETS = 16  # a power of two
MASK = BUCKETS - 1


class FrozenMap(dict[K, V]):
    """A dict that cannot change, for a few dozen entries: a change copies all of them."""

    __slots__ = ("_hash",)

    def set(self, key: K, value: V) -> FrozenMap[K, V]:
        return FrozenMap({**self, key: value})

    def discard(self, key: K) -> FrozenMap[K, V]:
        return FrozenMap({name: value for name, value in self.items() if name != key}) if key in self else self

    def __hash__(self) -> int:  # type: ignore[override]
        try:
            return self._hash
        except AttributeError:
            self._hash: int = hash(frozenset(self.items()))
            return self._hash

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a FrozenMap cannot change")

    __setitem__ = __delitem__ = update = setdefault = pop = popitem = clear = __ior__ = _refuse


class FrozenTable(Generic[K, V]):
    """The same for many entries, in a fixed number of small dicts by the hash of their keys: a change copies one.

    So it costs about the same at ten entries as at a thousand.
    """

    __slots__ = ("_buckets", "_hash")

    def __init__(self, items: Mapping[K, V] | None = None) -> None:
        self._buckets: list[dict[K, V]] = [{} for _ in range(BUCKETS)]
        self._hash: int | None = None
        for key, value in items.items() if items else ():
            self._buckets[hash(key) & MASK][key] = value

    def set(self, key: K, value: V) -> FrozenTable[K, V]:
        at = hash(key) & MASK
        return self._with(at, {**self._buckets[at], key: value})

    def discard(self, key: K) -> FrozenTable[K, V]:
        at = hash(key) & MASK
        if key not in self._buckets[at]:
            return self
        bucket = self._buckets[at].copy()
        del bucket[key]
        return self._with(at, bucket)

    def _with(self, at: int, bucket: dict[K, V]) -> FrozenTable[K, V]:
        changed: FrozenTable[K, V] = FrozenTable.__new__(FrozenTable)
        changed._buckets = self._buckets.copy()
        changed._buckets[at] = bucket
        changed._hash = None
        return changed

    def get(self, key: K) -> V | None:
        return self._buckets[hash(key) & MASK].get(key)

    def keys(self) -> tuple[K, ...]:
        return tuple(self)

    def values(self) -> tuple[V, ...]:
        return tuple(chain.from_iterable(map(dict.values, self._buckets)))

    def items(self) -> tuple[tuple[K, V], ...]:
        return tuple(chain.from_iterable(map(dict.items, self._buckets)))

    def __getitem__(self, key: K) -> V:
        return self._buckets[hash(key) & MASK][key]

    def __contains__(self, key: object) -> bool:
        return key in self._buckets[hash(key) & MASK]

    def __iter__(self) -> Iterator[K]:
        return chain.from_iterable(self._buckets)

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenTable) and self._buckets == other._buckets

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self.items()))
        return self._hash

    def __repr__(self) -> str:
        return f"FrozenTable({dict(self.items())!r})"
