"""How much of a prefill worker's KV may be held for one decode worker.

A decode worker that is slow to receive keeps the blocks of its prompts held here; without a bound it would in the end
hold all of them, and the prompts of every other decode worker would wait for it. Pure; asyncio thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Waiting:
    name: str
    peer: str
    num_blocks: int
    start: Callable[[], None]


class PeerGate:
    """Starts hand-overs in order of arrival per peer, each when what its peer holds leaves room for it.

    With several peers wanted each may hold `share` of all blocks. One hand-over may always be under way, however large.
    """

    def __init__(self, num_blocks: int, share: float) -> None:
        self._num_blocks = num_blocks
        self._share = share
        self._num_peers = 1
        self._held: dict[str, tuple[str, int]] = {}
        self._held_by: Counter[str] = Counter()
        self._waiting: dict[str, _Waiting] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def set_num_peers(self, num_peers: int) -> None:
        """How many peers there are to share with."""
        self._num_peers = num_peers
        self._start_what_fits()

    def enter(self, name: str, peer: str, num_blocks: int, start: Callable[[], None]) -> None:
        """Call `start`, now or once the peer holds little enough."""
        self._waiting[name] = _Waiting(name, peer, num_blocks, start)
        self._start_what_fits()

    def leave(self, name: str) -> None:
        """The hand-over holds nothing any more, or will never start."""
        self._waiting.pop(name, None)
        peer, num_blocks = self._held.pop(name, ("", 0))
        self._held_by[peer] -= num_blocks
        if not self._held_by[peer]:
            del self._held_by[peer]
        self._start_what_fits()

    def _start_what_fits(self) -> None:
        limit = self._num_blocks * (self._share if self._num_peers > 1 else 1.0)
        blocked: set[str] = set()
        for waiting in list(self._waiting.values()):
            held = self._held_by[waiting.peer]
            if waiting.peer in blocked or (held and held + waiting.num_blocks > limit):
                blocked.add(waiting.peer)  # what came later to the same peer does not overtake
                continue
            del self._waiting[waiting.name]
            self._held[waiting.name] = (waiting.peer, waiting.num_blocks)
            self._held_by[waiting.peer] += waiting.num_blocks
            waiting.start()
