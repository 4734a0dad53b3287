"""What world to explore: workers, requests, sizes and the faults that may be drawn."""

from __future__ import annotations

from dataclasses import dataclass

DEADLINE_S = 10.0  # of every lease and attempt, from the moment its command arrives
STALL_S = 20.0  # the stall watch fires after deadlines, so that both are explored

NETWORK = frozenset({"lose", "dup", "swap"})
TIME = frozenset({"tick"})
PROCESS = frozenset({"crash", "suspect"})
CLIENT = frozenset({"cancel"})
ENGINE = frozenset({"corrupt", "refuse"})
ALL_FAULTS = NETWORK | TIME | PROCESS | CLIENT | ENGINE


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """A request fixed to one prefill and one decode worker.

    Its prompt has `cached` + `chunks` blocks of one token. It emits `tokens`: the first by prefill, a second by decode.
    """

    prefill: int
    decode: int
    chunks: int
    cached: int = 0
    tokens: int = 2

    @property
    def num_blocks(self) -> int:
        return self.cached + self.chunks


@dataclass(frozen=True, slots=True)
class Config:
    """`faults`: how many may happen in one run, cancels included, drawn from `kinds`.

    `reduce`: leave out orders that make no difference.
    `fine`: every completion is a step of its own. Otherwise an engine's answer to a reservation is immediate and a
    transfer completes at both ends in one step; see README.md.
    """

    name: str
    prefills: int
    decodes: int
    requests: tuple[RequestSpec, ...]
    faults: int
    kinds: frozenset[str] = ALL_FAULTS
    window: int = 2
    prefill_blocks: int = 8
    decode_blocks: int = 4
    attempts: int = 2
    epochs: int = 2
    fine: bool = True
    reduce: bool = True

    @property
    def links(self) -> frozenset[tuple[int, int]]:
        """The pairs that are connected: those that a request uses."""
        return frozenset((request.prefill, request.decode) for request in self.requests)


ONE_BY_ONE = RequestSpec(0, 0, 1)
TWO_CHUNKS = RequestSpec(0, 0, 2)
