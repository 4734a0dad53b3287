"""The prefill half: computes prompts for decode workers and hands their KV over while it is still being computed.

Executes the prefill end of `kv_transfer.protocol`: engine callbacks, links, streams and timers become its events, its
actions become engine commands, transfers and frames. Asyncio thread only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import assert_never

import torch

from baton.common import events
from baton.engine.layer_groups import LinkSpeed
from baton.engine.ports import Abort, AddRequest, LinkMeasured, PrefillDone, Release, RequestFailed, SegmentWritten
from baton.worker.attempts import Attempt
from baton.worker.coordinator import TICK_S, Coordinator
from baton.worker.half import AttemptCommand, BaseHalf, PeerCommand, WorkerContext
from baton.worker.mailbox import Mailbox
from baton.worker.pair import Pairs
from baton.worker.session import RouterSession, engine_id
from baton.worker.streams import repeat
from baton.worker.tasks import Tasks
from kv_transfer import events as kv
from kv_transfer.messages import Abort as AbortLease
from kv_transfer.messages import Chunk, Commit, Committed, Finish, LeaseKey, Segment
from kv_transfer.plan import ONE_RANK, messages_of, shares_between
from kv_transfer.protocol import PrefillState, counters, prefill_step
from kv_transfer.sender import SendLink
from kv_transfer.wire import prefill_frame
from prefill_worker.dialer import Dialer
from prefill_worker.gate import PeerGate
from prefill_worker.peers import Peers
from protos import transfer_pb2, worker_pb2

STOP_TIMEOUT_S = 8.0
MESSAGE_S = 0.0002  # what a message costs either end beyond its bytes


@dataclass(slots=True)
class _Written:
    """Where a segment's KV lies, and when it is there."""

    block_ids: tuple[int, ...]
    event: torch.cuda.Event | None


@dataclass(slots=True, eq=False)
class _HandOver:
    """What the half remembers of one attempt until its blocks are released."""

    attempt: Attempt
    peer: str
    first_block: int
    started: bool = False
    packing: bool = False
    written: dict[Segment, _Written] = field(default_factory=dict)


class PrefillHalf(BaseHalf):
    """See the module. Attempts that end for the router stay here until the protocol releases their blocks."""

    commands = frozenset({"prefill", "connect_peer", "disconnect_peer"})

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._attempts = context.attempts
        self._layout = context.layout
        self._shares = shares_between(ONE_RANK, 0, ONE_RANK, 0, self._layout.num_layers, self._layout.num_kv_heads)
        self._handovers: dict[str, _HandOver] = {}
        self._written_at: dict[tuple[str, int], float] = {}  # by epoch and seq, from Packed to its Chunk
        self._tasks = Tasks(context.faults)
        self._protocol: Coordinator[PrefillState, kv.PrefillEvent, kv.PrefillAction] = Coordinator(
            PrefillState.initial(), prefill_step, self._execute, context.faults
        )
        self._link_speed = 0.0
        self._mailbox: Mailbox[kv.PrefillEvent] = Mailbox(context.loop, self._feed, context.faults)
        self._pairs: Pairs[transfer_pb2.PrefillFrame, SendLink] = Pairs(
            self._feed, context.layout, context.device, self._tasks, context.faults
        )
        self._gate = PeerGate(context.engine.kv_cache.shape[2], context.config.transfer.peer_share)
        self._peers = Peers(
            Dialer(context, self._pairs, self._feed, self._mailbox.post),
            self._tasks,
            context.faults,
            self._gate.set_num_peers,
        )

    async def start(self) -> None:
        self._tasks.spawn(repeat(TICK_S, self._tick), "prefill half: tick")

    async def stop(self) -> None:
        await self._peers.stop()
        await self._pairs.stop("the prefill worker stops", STOP_TIMEOUT_S)
        await self._tasks.cancel_all()
        self._mailbox.close()

    def staging_in_use(self) -> int:
        count = counters(self._protocol.state)
        return count.slots_in_flight + count.slots_quarantined

    # ---- from routers

    def begin(self, attempt: Attempt, command: AttemptCommand) -> None:
        assert isinstance(command, worker_pb2.PrefillCommand)
        cached = command.num_cached_tokens
        if cached % self._layout.block_size or cached > len(attempt.spec.token_ids):
            self._attempts.refuse(attempt, "invalid", f"{cached} cached tokens are no whole blocks of this prompt")
            return
        handover = _HandOver(attempt, command.decode_worker_id, cached // self._layout.block_size)
        self._handovers[attempt.engine_id] = handover
        deadline = self._context.clock.now() + self._context.config.transfer.lease_s
        lease = LeaseKey(command.lease, command.generation)
        self._feed(kv.PrefillRequested(attempt.key, handover.peer, lease, handover.first_block, deadline))

    def cancel(self, attempt: Attempt) -> None:
        self._feed(kv.Cancel(attempt.key))

    def on_peer_command(self, session: RouterSession, command: PeerCommand) -> None:
        if isinstance(command, worker_pb2.ConnectPeer):
            self._peers.want(session, command.worker_id, command.address)
        else:
            self._peers.unwant(session, command.worker_id)

    def on_router_lost(self, session: RouterSession) -> None:
        self._peers.forget(session)

    # ---- from the engine

    def on_segment(self, segment: SegmentWritten) -> None:
        """Cut what the engine wrote into what fits a slot. Nobody wants it once the attempt or its epoch has ended."""
        handover = self._handovers.get(segment.request_id)
        epoch = self._protocol.state.link(handover.peer).epoch if handover is not None else None
        if handover is None or epoch is None:
            return
        written = Segment(segment.layer_start, segment.layer_end, segment.block_start, segment.block_end)
        slot_bytes = self._pairs.get(epoch).slot_bytes
        for piece in messages_of(self._shares, written, self._layout.block_bytes_per_layer, slot_bytes):
            offset = piece.block_start - segment.block_start
            block_ids = segment.block_ids[offset : offset + piece.num_blocks]
            handover.written[piece] = _Written(block_ids, segment.event)
            num_bytes = self._layout.segment_bytes(piece.num_layers, piece.num_blocks)
            self._feed(kv.SegmentReady(handover.attempt.key, piece, num_bytes))

    def on_prefill_done(self, done: PrefillDone) -> None:
        handover = self._handovers.get(done.request_id)
        if handover is not None:
            ended = done.finish_reason is not None
            self._feed(kv.PrefillDone(handover.attempt.key, done.num_tokens, done.first_token, ended))

    def on_failure(self, failure: RequestFailed) -> None:
        handover = self._handovers.get(failure.request_id)
        if handover is None:
            return
        if failure.code == "invalid":
            self._attempts.refuse(handover.attempt, "invalid", failure.reason)
        self._feed(kv.PrefillFailed(handover.attempt.key, f"{failure.code}: {failure.reason}"))

    # ---- the protocol

    def _tick(self) -> None:
        self._feed(kv.Tick(self._context.clock.now()))
        self._tell_link_speed()

    def _tell_link_speed(self) -> None:
        """Let the engine plan for the slowest link when that has changed by a quarter."""
        speeds = [speed for link in self._pairs.links() if (speed := link.meter.bytes_per_s) is not None]
        slowest = min(speeds, default=self._link_speed)
        if abs(slowest - self._link_speed) > self._link_speed / 4:
            self._link_speed = slowest
            self._context.engine.post(LinkMeasured(LinkSpeed(slowest, MESSAGE_S)))

    def _feed(self, event: kv.PrefillEvent) -> None:
        if isinstance(event, kv.Packed) and event.written_at is not None:
            self._written_at[event.epoch, event.seq] = event.written_at
        if isinstance(event, kv.EpochDestroyed):
            self._written_at = {key: at for key, at in self._written_at.items() if key[0] != event.epoch}
        if isinstance(event, kv.FromDecode) and isinstance(event.message, Committed):
            self._note_of_lease(event.peer, event.message.lease, events.COMMITTED)
        self._protocol.feed(event)

    def _execute(self, action: kv.PrefillAction) -> None:
        match action:
            case kv.SendMessage():
                self._send(action)
            case kv.Pack():
                self._pack(action)
            case kv.StartSend():
                self._pairs.get(action.epoch).link.start_send(action)
            case kv.StartPrefill(key):
                self._enter(self._handovers[engine_id(key)])
            case kv.AbortPrefill(key):
                self._context.engine.post(Abort(engine_id(key)))
            case kv.ReleasePrefill(key):
                self._release(engine_id(key))
            case kv.ReportFailed(key, code, reason):
                self._report_failed(engine_id(key), code, reason)
            case kv.DestroyEpoch(_, epoch, reason):
                self._pairs.destroy(epoch, reason)
            case _:
                assert_never(action)

    def _enter(self, handover: _HandOver) -> None:
        """To the protocol the engine has it from here, also while it waits for other hand-overs to the same peer."""
        handover.started = True
        num_blocks = self._layout.num_blocks_for(len(handover.attempt.spec.token_ids))
        self._gate.enter(handover.attempt.engine_id, handover.peer, num_blocks, partial(self._start, handover))

    def _start(self, handover: _HandOver) -> None:
        attempt = handover.attempt
        request = attempt.spec.request(
            attempt.engine_id, self._context.clock.now(), hand_over=True, first_block=handover.first_block
        )
        self._context.engine.post(AddRequest(request))

    def _pack(self, action: kv.Pack) -> None:
        handover = self._handovers[engine_id(action.key)]
        if not handover.packing:
            handover.packing = True
            self._attempts.note(handover.attempt, events.TRANSFER_START)
        written = handover.written.pop(action.segment)
        self._pairs.get(action.epoch).link.pack(action, written.block_ids, written.event)

    def _send(self, action: kv.SendMessage) -> None:
        message = action.message
        assert isinstance(message, Chunk | Commit | Finish | AbortLease)
        frame = prefill_frame(message)
        if isinstance(message, Chunk):
            written_at = self._written_at.pop((action.epoch, message.seq), None)
            if written_at is not None:
                frame.chunk.written_at_s = written_at
        self._pairs.send(action.epoch, frame)
        if isinstance(message, Commit):
            self._note_of_lease(action.peer, message.lease, events.TRANSFER_END)

    def _release(self, id_: str) -> None:
        """Nothing reads the blocks any more. An attempt that has not failed is complete: decode goes on with it."""
        self._context.engine.post(Release(id_))
        self._gate.leave(id_)
        self._attempts.end(self._handovers.pop(id_).attempt)

    def _report_failed(self, id_: str, code: str, reason: str) -> None:
        handover = self._handovers[id_]
        if handover.started:
            self._attempts.fail(handover.attempt, code, reason)
        else:
            del self._handovers[id_]
            self._attempts.refuse(handover.attempt, code, reason)

    def _note_of_lease(self, peer: str, lease: LeaseKey, name: str) -> None:
        known = self._protocol.state.attempt_of_lease(peer, lease)
        if known is not None:
            self._attempts.note(self._handovers[engine_id(known.key)].attempt, name)
