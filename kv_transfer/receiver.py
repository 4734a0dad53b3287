"""The decode end of one epoch: receives chunks into receive slots, verifies and scatters them.

The decode coordinator makes one per epoch and executes the protocol's StartRecv and Unpack actions through it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kv_transfer.device_clock import clock_of
from kv_transfer.events import PeerLost, Received, StartRecv, Unpack, Unpacked
from kv_transfer.fingerprint import block_salts
from kv_transfer.link import LOW_PRIORITY, Link
from kv_transfer.packing import Packer
from kv_transfer.staging import StagingPool
from kv_transfer.timeline import Timeline
from kv_transfer.transport import PairTransport, Transfer, TransferError

RecvEvent = Received | Unpacked | PeerLost


@dataclass(slots=True)
class _Arrival:
    """A receive that was asked for. `transfer`: it is launched. `is_followed`: an unpack was asked for as well.

    `has_ended`, `then`: the host has waited for it, and what it shall do at that moment.
    """

    transfer: Transfer | None = None
    is_followed: bool = False
    has_ended: bool = False
    then: Callable[[], None] | None = None


class RecvLink(Link[Received | Unpacked]):
    """See `Link`. The methods return at once; their outcome comes through `on_event`.

    A slot's unpack may be asked for as soon as its receive was: it runs when the data is there. Over NCCL both are then
    launched in one go, the one behind the other on the device, and the host hears of the end of the second only.
    """

    def __init__(
        self,
        transport: PairTransport,
        staging: StagingPool,
        packer: Packer,
        kv_cache: torch.Tensor,
        on_event: Callable[[RecvEvent], None],
        timeline: Timeline | None = None,
        close_timeout_s: float = 10.0,
    ) -> None:
        super().__init__(transport, staging, on_event, "kv recv", LOW_PRIORITY, close_timeout_s)
        self._packer = packer
        self._kv_cache = kv_cache
        self._timeline = timeline or Timeline()
        self._clock = clock_of(staging.device)
        self._arrivals: dict[int, _Arrival] = {}  # by slot, until its unpack

    def start_recv(self, action: StartRecv) -> None:
        """Receive `num_bytes` into a slot; then Received, unless an unpack has been asked for meanwhile.

        Post it when the peer's Chunk is here, not ahead.
        """
        arrival = self._arrivals[action.slot] = _Arrival()
        self._submit(self._wire, action, lambda: self._start_recv(action, arrival))

    def unpack(self, action: Unpack, block_ids: Sequence[int]) -> None:
        """Verify a slot and scatter it into the blocks; then Unpacked, not ok if a fingerprint differs.

        `block_ids`: physical blocks of the segment in logical order; they must stay the lease's until Unpacked.
        """
        arrival = self._arrivals.pop(action.slot, _Arrival())
        arrival.is_followed = True
        self._submit_unpack(action, block_ids, arrival)

    def _submit_unpack(self, action: Unpack, block_ids: Sequence[int], arrival: _Arrival) -> None:
        self._submit(self._copy, action, lambda: self._start_unpack(action, block_ids, arrival))

    def _start_recv(self, action: StartRecv, arrival: _Arrival) -> Callable[[], Received | None] | None:
        slot = self._staging.slot(action.slot)
        if not 0 < action.num_bytes <= slot.numel():
            raise TransferError(f"chunk {action.seq} announces {action.num_bytes} bytes, a slot has {slot.numel()}")
        self._wire.stream.enter()
        transfer = arrival.transfer = self._transport.start_recv(slot[: action.num_bytes])
        self._timeline.posted(action.epoch, action.seq, time.monotonic())

        def is_passed_on() -> bool:
            """Asked once more at the end: the unpack may be asked for while the receive is being launched."""
            return arrival.is_followed and transfer.event is not None

        def finish() -> Received | None:
            if is_passed_on():
                return None
            transfer.wait()
            self._timeline.received(action.epoch, action.seq, time.monotonic())
            with self._reporting:
                arrival.has_ended = True
                if arrival.then is not None:
                    arrival.then()
            return None if arrival.is_followed else Received(action.peer, action.epoch, action.seq)

        return None if is_passed_on() else finish

    def _is_there(self, arrival: _Arrival, then: Callable[[], None]) -> bool:
        """Whether the host has seen the end of the receive. If not, it calls `then` when it does."""
        with self._reporting:
            arrival.then = then
            return arrival.has_ended

    def _start_unpack(
        self, action: Unpack, block_ids: Sequence[int], arrival: _Arrival
    ) -> Callable[[], Unpacked] | None:
        transfer = arrival.transfer
        if transfer is None:
            raise TransferError(f"chunk {action.seq} was not received into slot {action.slot}")
        if transfer.event is None:
            again = partial(self._submit_unpack, action, block_ids, arrival)
            if not self._is_there(arrival, again):
                return None
        num_bytes = self._staging.layout.segment_bytes(action.segment.num_layers, action.segment.num_blocks)
        data = self._staging.slot(action.slot)[:num_bytes]
        salts = block_salts(action.lease, action.seq, action.segment)
        self._copy.stream.enter()
        transfer.follow()
        copy = self._packer.start_unpack(self._kv_cache, action.segment, block_ids, data, salts, action.fingerprints)

        def finish() -> Unpacked:
            is_ok = copy.wait()
            transfer.wait()  # after an aborted receive there is no verdict
            if transfer.event is not None and (at := self._clock.time_of(transfer.event)) is not None:
                self._timeline.received(action.epoch, action.seq, at)
            return Unpacked(action.peer, action.epoch, action.seq, is_ok)

        return finish
