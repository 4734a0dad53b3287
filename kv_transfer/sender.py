"""The prefill end of one epoch: packs segments into send slots and sends them.

The prefill coordinator makes one per epoch and executes the protocol's Pack and StartSend actions through it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from kv_transfer.device_clock import clock_of
from kv_transfer.events import Pack, Packed, PeerLost, SendDone, StartSend
from kv_transfer.fingerprint import block_salts
from kv_transfer.link import HIGH_PRIORITY, Link
from kv_transfer.link_meter import LinkMeter
from kv_transfer.packing import Packer
from kv_transfer.staging import StagingPool
from kv_transfer.transport import PairTransport, TransferError

SendEvent = Packed | SendDone | PeerLost


class SendLink(Link[Packed | SendDone]):
    """See `Link`. The methods return at once; their outcome comes through `on_event`."""

    def __init__(
        self,
        transport: PairTransport,
        staging: StagingPool,
        packer: Packer,
        kv_cache: torch.Tensor,
        on_event: Callable[[SendEvent], None],
        close_timeout_s: float = 10.0,
    ) -> None:
        super().__init__(transport, staging, on_event, "kv send", HIGH_PRIORITY, close_timeout_s)
        self._packer = packer
        self._kv_cache = kv_cache
        self._packed_bytes: dict[int, int] = {}
        self._clock = clock_of(staging.device)
        self.meter = LinkMeter()

    def pack(self, action: Pack, block_ids: Sequence[int], event: torch.cuda.Event | None) -> None:
        """Gather the segment's blocks into its slot once `event` has fired; then Packed.

        `block_ids`: physical blocks of the segment in logical order; they must stay as they are until Packed.
        """
        self._submit(self._copy, action, lambda: self._start_pack(action, block_ids, event))

    def start_send(self, action: StartSend) -> None:
        """Send a packed slot; then SendDone."""
        self._submit(self._wire, action, lambda: self._start_send(action))

    def _start_pack(
        self, action: Pack, block_ids: Sequence[int], event: torch.cuda.Event | None
    ) -> Callable[[], Packed]:
        num_bytes = self._staging.layout.segment_bytes(action.segment.num_layers, action.segment.num_blocks)
        out = self._staging.slot(action.slot)[:num_bytes]
        salts = block_salts(action.lease, action.seq, action.segment)
        asked_at = time.monotonic()
        self._copy.stream.enter(event)
        copy = self._packer.start_pack(self._kv_cache, action.segment, block_ids, out, salts)

        def finish() -> Packed:
            fingerprints = tuple(copy.wait())
            self._packed_bytes[action.slot] = num_bytes
            written_at = asked_at if event is None else self._clock.time_of(event)
            return Packed(action.peer, action.epoch, action.seq, fingerprints, written_at)

        return finish

    def _start_send(self, action: StartSend) -> Callable[[], SendDone]:
        # Gloo ends the receiving process when more bytes come than it asked for: never send another number.
        packed = self._packed_bytes.pop(action.slot, None)
        if packed != action.num_bytes:
            raise TransferError(f"slot {action.slot} holds {packed} packed bytes, asked to send {action.num_bytes}")
        self._wire.stream.enter()
        started = time.monotonic()
        transfer = self._transport.start_send(self._staging.slot(action.slot)[: action.num_bytes])

        def finish() -> SendDone:
            transfer.wait()
            # The device's own time where there is one: this thread may wake up late, and then twice at once.
            ended = None if transfer.event is None else self._clock.time_of(transfer.event)
            self.meter.add(action.num_bytes, started, time.monotonic() if ended is None else ended)
            return SendDone(action.peer, action.epoch, action.seq)

        return finish
