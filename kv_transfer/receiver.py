"""The decode end of one epoch: receives chunks into receive slots, verifies and scatters them.

The decode coordinator makes one per epoch and executes the protocol's StartRecv and Unpack actions through it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from kv_transfer.events import PeerLost, Received, StartRecv, Unpack, Unpacked
from kv_transfer.fingerprint import block_salts
from kv_transfer.link import LOW_PRIORITY, Link
from kv_transfer.packing import Packer
from kv_transfer.staging import StagingPool
from kv_transfer.timeline import Timeline
from kv_transfer.transport import PairTransport, TransferError

RecvEvent = Received | Unpacked | PeerLost


class RecvLink(Link[Received | Unpacked]):
    """See `Link`. The methods return at once; their outcome comes through `on_event`."""

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

    def start_recv(self, action: StartRecv) -> None:
        """Receive `num_bytes` into a slot; then Received. Post it when the peer's Chunk is here, not ahead."""
        self._submit(self._wire, action, lambda: self._start_recv(action))

    def unpack(self, action: Unpack, block_ids: Sequence[int]) -> None:
        """Verify a received slot and scatter it into the blocks; then Unpacked, not ok if a fingerprint differs.

        `block_ids`: physical blocks of the segment in logical order; they must stay the lease's until Unpacked.
        """
        self._submit(self._copy, action, lambda: self._start_unpack(action, block_ids))

    def _start_recv(self, action: StartRecv) -> Callable[[], Received]:
        slot = self._staging.slot(action.slot)
        if not 0 < action.num_bytes <= slot.numel():
            raise TransferError(f"chunk {action.seq} announces {action.num_bytes} bytes, a slot has {slot.numel()}")
        with self._wire.stream.after(None):
            transfer = self._transport.start_recv(slot[: action.num_bytes])
        self._timeline.posted(action.epoch, action.seq, time.monotonic())

        def finish() -> Received:
            transfer.wait()
            return Received(action.peer, action.epoch, action.seq)

        return finish

    def _start_unpack(self, action: Unpack, block_ids: Sequence[int]) -> Callable[[], Unpacked]:
        num_bytes = self._staging.layout.segment_bytes(action.segment.num_layers, action.segment.num_blocks)
        data = self._staging.slot(action.slot)[:num_bytes]
        salts = block_salts(action.lease, action.seq, action.segment)
        with self._copy.stream.after(None):
            copy = self._packer.start_unpack(
                self._kv_cache, action.segment, block_ids, data, salts, action.fingerprints
            )
        return lambda: Unpacked(action.peer, action.epoch, action.seq, copy.wait())
