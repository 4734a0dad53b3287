"""Which prefill worker may hand over to which decode worker, and why not. Pure bookkeeping, owned by the registry.

A pair is schedulable while its prefill worker reports it connected and it is not resting. It rests after a failed
hand-over, longer each time in a row, and is then tried again; one success clears that. An incompatible pair never is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protos import worker_pb2 as pb

CONNECTED: Final = "connected"
CONNECTING: Final = "connecting"
INCOMPATIBLE: Final = "incompatible"
_FIRST_REST_S, _MAX_REST_S = 0.5, 30.0

PairId = tuple[str, str]


@dataclass(slots=True)
class Pair:
    """`state`: "incompatible", or what the prefill worker reported last. `failures`: failed hand-overs in a row."""

    prefill: str
    decode: str
    state: str
    message: str = ""
    failures: int = 0
    resting_until: float = 0.0


class PairTable:
    """Keyed by (prefill worker_id, decode worker_id)."""

    def __init__(self) -> None:
        self._pairs: dict[PairId, Pair] = {}

    def introduce(self, prefill: pb.WorkerHello, decode: pb.WorkerHello) -> Pair:
        """Register a pair; it starts as connecting, or as incompatible with every difference named."""
        difference = layout_difference(prefill.layout, decode.layout)
        state = INCOMPATIBLE if difference else CONNECTING
        pair = Pair(prefill.worker_id, decode.worker_id, state, difference)
        self._pairs[(pair.prefill, pair.decode)] = pair
        return pair

    def drop_worker(self, worker_id: str) -> None:
        for pair_id in [pair_id for pair_id in self._pairs if worker_id in pair_id]:
            del self._pairs[pair_id]

    def report(self, prefill: str, decode: str, state: str, message: str) -> None:
        """Take a prefill worker's PeerState. Unknown and incompatible pairs stay as they are."""
        pair = self._pairs.get((prefill, decode))
        if pair is not None and pair.state != INCOMPATIBLE:
            pair.state, pair.message = state, message

    def handover_failed(self, prefill: str, decode: str, now: float, message: str) -> None:
        pair = self._pairs.get((prefill, decode))
        if pair is not None:
            pair.resting_until = now + min(_FIRST_REST_S * 2**pair.failures, _MAX_REST_S)
            pair.failures = min(pair.failures + 1, 16)
            pair.message = message

    def handover_succeeded(self, prefill: str, decode: str) -> None:
        pair = self._pairs.get((prefill, decode))
        if pair is not None and pair.failures:
            pair.failures, pair.resting_until, pair.message = 0, 0.0, ""

    def schedulable(self, now: float) -> frozenset[PairId]:
        return frozenset(
            pair_id for pair_id, pair in self._pairs.items() if pair.state == CONNECTED and pair.resting_until <= now
        )

    def all(self) -> list[Pair]:
        return list(self._pairs.values())


def layout_difference(prefill: pb.KVLayout, decode: pb.KVLayout) -> str:
    """Name each field that differs; empty when KV can be handed over."""
    differences = [
        f"{field.name}: prefill {getattr(prefill, field.name)!r}, decode {getattr(decode, field.name)!r}"
        for field in pb.KVLayout.DESCRIPTOR.fields
        if getattr(prefill, field.name) != getattr(decode, field.name)
    ]
    return "; ".join(differences)
