"""Which prefill worker may hand over to which decode worker, and why not. Pure bookkeeping, owned by the registry.

A pair is schedulable while its prefill worker reports it connected and it is not resting. It rests after a failed
hand-over, longer each time in a row, and is then tried with one hand-over at a time; one success clears that. An
incompatible pair never is schedulable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protos import worker_pb2 as pb

CONNECTED: Final = "connected"
CONNECTING: Final = "connecting"
INCOMPATIBLE: Final = "incompatible"
_FIRST_REST_S, _MAX_REST_S = 0.5, 30.0
_MAX_DOUBLINGS = 6

PairId = tuple[str, str]


@dataclass(slots=True)
class Pair:
    """`state`: "incompatible", or what the prefill worker reported last; `message`: why.

    `failures`: failed hand-overs in a row; `failure`: what the last one met. `probing`: behind failures, a hand-over is
    under way that shows whether the pair works again.
    """

    prefill: str
    decode: str
    state: str
    message: str = ""
    failures: int = 0
    failure: str = ""
    resting_until: float = 0.0
    probing: bool = False


class HandOver:
    """One hand-over over a pair, from its start to the first that is known of it.

    Those under way when another one fails are no further failures of the pair, and no proof that it works again.
    """

    def __init__(self, pair: Pair, *, may_prove: bool) -> None:
        self._pair = pair
        self._failures = pair.failures
        self._is_open = True
        self._probes = may_prove and pair.failures > 0
        pair.probing = pair.probing or self._probes

    def succeeded(self) -> None:
        """The decode worker has the KV. Repeating it is a no-op."""
        pair = self._pair
        if self._settle():
            pair.failures, pair.failure, pair.resting_until, pair.probing = 0, "", 0.0, False

    def failed(self, now: float, message: str) -> None:
        pair = self._pair
        if self._settle():
            pair.resting_until = now + min(_FIRST_REST_S * 2 ** min(pair.failures, _MAX_DOUBLINGS), _MAX_REST_S)
            pair.failures += 1
            pair.failure = message
            pair.probing = False

    def given_up(self) -> None:
        """It says nothing of the pair: a worker was lost, or there was nothing to hand over. A no-op once settled."""
        if self._settle() and self._probes:
            self._pair.probing = False

    def _settle(self) -> bool:
        """Whether what is now known is news of the pair as it is."""
        was_open, self._is_open = self._is_open, False
        return was_open and self._pair.failures == self._failures


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

    def begin(self, prefill: str, decode: str, *, may_prove: bool = True) -> HandOver:
        """A schedulable pair is used; whoever began it says what became of it.

        One that cannot prove that the pair works (nothing is handed over to decode) keeps nobody else from trying.
        """
        return HandOver(self._pairs[(prefill, decode)], may_prove=may_prove)

    def schedulable(self, now: float) -> frozenset[PairId]:
        return frozenset(
            pair_id
            for pair_id, pair in self._pairs.items()
            if pair.state == CONNECTED and pair.resting_until <= now and not pair.probing
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
