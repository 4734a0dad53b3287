"""The hand-over protocol: two pure state machines, `(state, event) -> (state, actions)`. Import it from here.

No I/O, no clock, no torch. The coordinator of a worker owns one state, feeds it events on the asyncio thread and
executes the returned actions in order. What the surroundings owe the machines:

- a Tick about once a second, also when nothing is due: deadlines and the stall watch move only with it;
- a DestroyEpoch is answered by one EpochDestroyed, after which no pack, send, receive or unpack of that epoch runs;
- PeerConnected(epoch) comes before any other event of that epoch, and no epoch name is used twice;
- SegmentReady of an attempt comes in order, all of it before PrefillDone.

Nothing else is assumed of messages: they may be lost, doubled, late or out of order. The invariants I1 to I8 hold in
every case; `tests/transfer/explorer` walks the interleavings.

`link_protocol` is what both ends do alike; `*_protocol` dispatches, `*_chunks` is the way of a chunk, `*_ends` how
holders of blocks end, `*_state` what an end knows.
"""

from __future__ import annotations

from kv_transfer.decode_protocol import DecodeState, decode_step
from kv_transfer.link_state import STALL_TIMEOUT_S, Counters, counters, next_deadline
from kv_transfer.prefill_protocol import PrefillState, prefill_step

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
