"""The hand-over protocol: two pure state machines, `(state, event) -> (state, actions)`. Import it from here.

No I/O, no clock, no torch. The coordinator of a worker owns one state, feeds it events on the asyncio thread and
executes the returned actions in order. What the surroundings owe the machines:

- a Tick about once a second, also when nothing is due: deadlines and the stall watch move only with it;
- a DestroyEpoch is answered by one EpochDestroyed, after which no pack, send, receive or unpack of that epoch runs;
- PeerConnected(epoch) comes before any other event of that epoch, and no epoch name is used twice;
- SegmentReady of an attempt comes in order, all of it before PrefillDone.

Nothing else is assumed of messages: they may be lost, doubled, late or out of order. The invariants I1 to I8 hold in
every case; `tests/transfer/explorer` walks the interleavings.
"""

from __future__ import annotations

from kv_transfer.decode_protocol import DecodeState, decode_step
from kv_transfer.prefill_protocol import PrefillState, prefill_step
from kv_transfer.protocol_common import STALL_TIMEOUT_S, Counters

__all__ = [
    "STALL_TIMEOUT_S",
    "Counters",
    "DecodeState",
    "PrefillState",
    "counters",
    "decode_step",
    "next_deadline",
    "prefill_step",
]


def next_deadline(state: PrefillState | DecodeState) -> float | None:
    """When the next Tick is due at the latest, in the clock of the events; None while nothing waits."""
    return state.next_deadline()


def counters(state: PrefillState | DecodeState) -> Counters:
    """Live leases or attempts, staging slots in flight, staging slots in quarantine."""
    return state.counters()
