"""Staging slots of one pair as the protocol sees them: numbers that are free, in flight or quarantined.

The slots outlive an epoch. What an epoch had in flight when it was lost stays quarantined until the epoch is destroyed,
even if the pair has connected anew meanwhile (invariant I1). Owned by a peer's link inside a protocol state.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

P = TypeVar("P")


class DyingEpoch(NamedTuple, Generic[P]):
    """An epoch that is lost and not yet destroyed.

    `slots`: what it may still touch. `pins`: whose KV blocks a pack or unpack of it may still touch.
    """

    epoch: str
    slots: tuple[int, ...]
    pins: tuple[P, ...]


class SlotPool(NamedTuple, Generic[P]):
    """`free` is usable now, lowest first, by the live epoch, whose window is `window` (0: no live epoch)."""

    window: int = 0
    free: tuple[int, ...] = ()
    dying: tuple[DyingEpoch[P], ...] = ()

    def open_epoch(self, window: int) -> SlotPool[P]:
        quarantined = {slot for epoch in self.dying for slot in epoch.slots}
        return SlotPool(window, tuple(slot for slot in range(window) if slot not in quarantined), self.dying)

    def take(self) -> tuple[int, SlotPool[P]]:
        return self.free[0], SlotPool(self.window, self.free[1:], self.dying)

    def give(self, slot: int) -> SlotPool[P]:
        return SlotPool(self.window, tuple(sorted((*self.free, slot))), self.dying)

    def lose_epoch(self, epoch: str, slots: tuple[int, ...], pins: tuple[P, ...]) -> SlotPool[P]:
        return SlotPool(0, (), (*self.dying, DyingEpoch(epoch, slots, pins)))

    def destroyed(self, epoch: str) -> SlotPool[P]:
        """The quarantined slots of `epoch` are free again, for the live epoch if there is one."""
        freed = {slot for lost in self.dying if lost.epoch == epoch for slot in lost.slots if slot < self.window}
        left = tuple(lost for lost in self.dying if lost.epoch != epoch)
        return SlotPool(self.window, tuple(sorted({*self.free, *freed})), left)

    def is_dying(self, epoch: str) -> bool:
        return any(lost.epoch == epoch for lost in self.dying)

    def pins(self, epoch: str) -> tuple[P, ...]:
        return tuple(pin for lost in self.dying if lost.epoch == epoch for pin in lost.pins)

    def pinned(self, who: P) -> bool:
        return any(who in lost.pins for lost in self.dying)

    @property
    def num_quarantined(self) -> int:
        return sum(len(lost.slots) for lost in self.dying)
