"""Token ids of prompts, drawn from keys: the same (seed, key) always gives the same ids, on every numpy version.

Uses the raw output of Philox only, which numpy keeps stable; its `Generator` methods are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]
"""[num_tokens]"""


class Domain(IntEnum):
    """Keeps equal keys of different meaning apart."""

    PROMPT = 1
    PIECE = 2


@dataclass(frozen=True)
class TokenSource:
    """Draws ids in `low` … `high` - 1. Owned by one workload; pure."""

    seed: int
    low: int
    high: int

    def draw(self, domain: Domain, key: int, count: int) -> TokenIds:
        """[count]; a shorter draw of the same key is a prefix of a longer one."""
        bits = np.random.Philox(
            key=np.array([self.seed & _MASK, key & _MASK], dtype=np.uint64),
            counter=np.array([0, 0, 0, domain], dtype=np.uint64),
        )
        raw = np.asarray(bits.random_raw(count), dtype=np.uint64)
        return (raw % np.uint64(self.high - self.low)).astype(np.int64) + self.low


_MASK = (1 << 64) - 1
