"""An immutable mapping for protocol states: copy on write, hashable, with the hash kept.

Used by the pure state machines only. Copying costs O(entries), which is cheap at the few hundred entries a worker has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class FrozenMap(Generic[K, V]):
    """A dict that cannot change: `set` and `discard` return new maps. Equality ignores the order of insertion."""

    __slots__ = ("_hash", "_items")

    def __init__(self, items: Mapping[K, V] | None = None) -> None:
        self._items: dict[K, V] = dict(items) if items else {}
        self._hash: int | None = None

    def set(self, key: K, value: V) -> FrozenMap[K, V]:
        changed: FrozenMap[K, V] = FrozenMap(self._items)
        changed._items[key] = value
        return changed

    def discard(self, key: K) -> FrozenMap[K, V]:
        if key not in self._items:
            return self
        changed: FrozenMap[K, V] = FrozenMap(self._items)
        del changed._items[key]
        return changed

    def get(self, key: K) -> V | None:
        return self._items.get(key)

    def keys(self) -> tuple[K, ...]:
        return tuple(self._items)

    def values(self) -> tuple[V, ...]:
        return tuple(self._items.values())

    def items(self) -> tuple[tuple[K, V], ...]:
        return tuple(self._items.items())

    def __getitem__(self, key: K) -> V:
        return self._items[key]

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenMap) and self._items == other._items

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._items.items()))
        return self._hash

    def __repr__(self) -> str:
        return f"FrozenMap({self._items!r})"
