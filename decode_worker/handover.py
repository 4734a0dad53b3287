"""The decode half: reserves blocks for prompts that prefill workers compute, receives and verifies their KV, admits.

Executes the decode end of `kv_transfer.protocol`: what happens becomes its events, its actions become engine commands,
transfers and frames. Asyncio thread only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from baton.common import events
from baton.engine.ports import Admission, Refusal, Release, Reservation, Reserve
from baton.worker.attempts import Attempt
from baton.worker.coordinator import TICK_S, Coordinator
from baton.worker.half import AttemptCommand, BaseHalf, WorkerContext
from baton.worker.mailbox import Mailbox
from baton.worker.pair import Pairs
from baton.worker.session import engine_id
from baton.worker.streams import repeat
from baton.worker.tasks import Tasks
from decode_worker.listener import Listener
from kv_transfer import events as kv
from kv_transfer.messages import Abort as AbortLease
from kv_transfer.messages import Chunk, ChunksDone, Commit, Committed
from kv_transfer.protocol import DecodeState, counters, decode_step
from kv_transfer.receiver import RecvLink
from kv_transfer.timeline import Timeline, TransferTotals
from kv_transfer.wire import decode_frame
from protos import transfer_pb2, worker_pb2

STOP_TIMEOUT_S = 8.0
BUSY_RETRY_S = 0.1


@dataclass(slots=True, eq=False)
class _Lease:
    """`block_ids` are the prompt's physical blocks in logical order, once the engine has given them."""

    attempt: Attempt
    block_ids: tuple[int, ...] = ()
    receiving: bool = False


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the engine said to the Reserve of a lease."""

    lease: int
    answer: Reservation | Refusal


class DecodeHalf(BaseHalf):
    """See the module. After its admission an attempt belongs to local generation."""

    commands = frozenset({"open"})

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._attempts = context.attempts
        self.timeline = Timeline()
        self._leases: dict[int, _Lease] = {}
        self._credited: dict[str, int] = {}  # chunks whose credits were returned, by epoch
        self._tasks = Tasks(context.faults)
        self._protocol: Coordinator[DecodeState, kv.DecodeEvent, kv.DecodeAction] = Coordinator(
            DecodeState.initial(context.layout.num_layers), decode_step, self._execute, context.faults
        )
        self._mailbox: Mailbox[kv.DecodeEvent | _Answer] = Mailbox(context.loop, self._on_mail, context.faults)
        self._pairs: Pairs[transfer_pb2.DecodeFrame, RecvLink] = Pairs(
            self._feed, context.layout, context.device, self._tasks, context.faults
        )
        self._listener = Listener(context, self._pairs, self._feed, self._mailbox.post, self.timeline, self._tasks)

    @property
    def transfer_address(self) -> str:
        return self._listener.address

    async def start(self) -> None:
        await self._listener.start()
        self._tasks.spawn(repeat(TICK_S, self._tick), "decode half: tick")

    async def stop(self) -> None:
        self._listener.refuse_new()
        await self._pairs.stop("the decode worker stops", STOP_TIMEOUT_S)
        await self._tasks.cancel_all()
        self._mailbox.close()
        self._listener.close()

    def staging_in_use(self) -> int:
        count = counters(self._protocol.state)
        return count.slots_in_flight + count.slots_quarantined

    def transfer_totals(self) -> TransferTotals | None:
        return self.timeline.totals()

    # ---- from routers

    def begin(self, attempt: Attempt, command: AttemptCommand) -> None:
        assert isinstance(command, worker_pb2.OpenCommand)
        deadline = self._context.clock.now() + self._context.config.transfer.lease_s
        num_tokens = len(attempt.spec.token_ids)
        self._feed(kv.OpenRequested(attempt.key, command.prefill_worker_id, num_tokens, deadline))

    def cancel(self, attempt: Attempt) -> None:
        self._feed(kv.Cancel(attempt.key))

    # ---- the protocol

    def _tick(self) -> None:
        self._feed(kv.Tick(self._context.clock.now()))

    def _on_mail(self, mail: kv.DecodeEvent | _Answer) -> None:
        if isinstance(mail, _Answer):
            self._on_answer(mail.lease, mail.answer)
        else:
            self._feed(mail)

    def _feed(self, event: kv.DecodeEvent) -> None:
        now = self._context.clock.now()
        match event:
            case kv.PeerConnected():
                self.timeline.epoch_begun(event.epoch)
            case kv.FromPrefill(message=Chunk() as chunk):
                self._note_receiving(chunk.lease.lease)
            case kv.FromPrefill(message=Commit() as commit):
                self.timeline.committed(commit.lease.lease, now)
            case kv.Unpacked():
                self.timeline.verified(event.epoch, event.seq, now)
            case kv.EpochDestroyed():
                self.timeline.epoch_ended(event.epoch)
                self._credited.pop(event.epoch, None)
        self._protocol.feed(event)

    def _execute(self, action: kv.DecodeAction) -> None:
        match action:
            case kv.SendMessage(peer, epoch, ChunksDone() as done):
                self._return_credits(peer, epoch, done)
            case kv.SendMessage(_, epoch, message):
                assert isinstance(message, Committed | AbortLease)
                self._pairs.send(epoch, decode_frame(message))
            case kv.StartRecv(peer, epoch, seq):
                self._pairs.get(epoch).link.start_recv(action)
                # The link runs what is asked of it next when the data is there: no need to wait for that here.
                self._feed(kv.Received(peer, epoch, seq))
            case kv.Unpack():
                self._unpack(action)
            case kv.ReserveBlocks(key, lease):
                self._reserve(key, lease)
            case kv.ReportReserved():
                self._report_reserved(action)
            case kv.ReportRefused(key, code, reason):
                self._report_refused(engine_id(key), code, reason)
            case kv.ReportFailed(key, code, reason):
                self._report_failed(engine_id(key), code, reason)
            case kv.Admit():
                self._admit(action)
            case kv.ReleaseLease(_, lease):
                self._release(lease.lease)
            case kv.DestroyEpoch(_, epoch, reason):
                self._pairs.destroy(epoch, reason)
            case _:
                assert_never(action)

    def _return_credits(self, peer: str, epoch: str, done: ChunksDone) -> None:
        """A quarter of the window at a time while chunks are under way: frames cost more than waiting for credits."""
        self.timeline.done(epoch, done.through)
        link = self._protocol.state.link(peer)
        if link.flights and 4 * (done.through - self._credited.get(epoch, 0)) < link.slots.window:
            return
        self._credited[epoch] = done.through
        self._pairs.send(epoch, decode_frame(done))

    # ---- blocks

    def _reserve(self, key: kv.AttemptKey, lease: int) -> None:
        attempt = self._attempts.get(engine_id(key))
        assert attempt is not None, f"{key} asks for blocks after its end"
        self._leases[lease] = _Lease(attempt)
        self.timeline.reserved(lease)
        spec = attempt.spec
        self._context.engine.post(
            Reserve(
                reservation_id=_reservation_id(lease),
                token_ids=spec.token_ids,
                max_total_tokens=len(spec.token_ids) + spec.sampling.max_tokens,
                reply=lambda answer: self._mailbox.post(_Answer(lease, answer)),
            )
        )

    def _on_answer(self, lease: int, answer: Reservation | Refusal) -> None:
        if isinstance(answer, Refusal):
            self._feed(kv.BlocksRefused(lease, answer.code, answer.reason))
            del self._leases[lease]
            self.timeline.lease_ended(lease)
            return
        block_ids = self._leases[lease].block_ids = answer.block_table
        self._feed(kv.BlocksReserved(lease, answer.generation, answer.first_block, len(block_ids)))

    def _unpack(self, action: kv.Unpack) -> None:
        block_ids = self._leases[action.lease.lease].block_ids
        wanted = block_ids[action.segment.block_start : action.segment.block_end]
        self._pairs.get(action.epoch).link.unpack(action, wanted)

    def _admit(self, action: kv.Admit) -> None:
        """The blocks become the request's. From here the attempt is a local one. The engine hears of it first."""
        lease = action.lease.lease
        attempt = self._leases.pop(lease).attempt
        attempt.owner = self._context.local
        request = attempt.spec.request(attempt.engine_id, self._context.clock.now())
        self._context.engine.post(Admission(_reservation_id(lease), request, action.first_token))
        self.timeline.admissible(lease, attempt.key.request_id, action.num_tokens, self._context.clock.now())
        for name in (events.TRANSFER_END, events.COMMITTED):
            self._attempts.note(attempt, name)
        self._attempts.flush(attempt)

    def _release(self, lease: int) -> None:
        """Nothing writes to the blocks any more. An attempt that has not failed ended at its first token."""
        self._context.engine.post(Release(_reservation_id(lease)))
        self.timeline.lease_ended(lease)
        self._attempts.end(self._leases.pop(lease).attempt)

    # ---- what the router hears

    def _report_reserved(self, action: kv.ReportReserved) -> None:
        attempt = self._leases[action.lease.lease].attempt
        self._attempts.note(attempt, events.RESERVED)
        self._attempts.flush(attempt)
        reserved = worker_pb2.Reserved(
            key=attempt.name,
            lease=action.lease.lease,
            generation=action.lease.generation,
            num_cached_tokens=action.first_block * self._context.layout.block_size,
        )
        attempt.session.send(worker_pb2.WorkerFrame(reserved=reserved))

    def _report_refused(self, id_: str, code: str, reason: str) -> None:
        attempt = self._attempts.get(id_)
        if attempt is not None:
            self._attempts.refuse(attempt, code, reason, BUSY_RETRY_S if code == "busy" else 0.0)

    def _report_failed(self, id_: str, code: str, reason: str) -> None:
        attempt = self._attempts.get(id_)
        if attempt is not None:
            self._attempts.fail(attempt, code, reason)

    def _note_receiving(self, lease: int) -> None:
        known = self._leases.get(lease)
        if known is not None and not known.receiving:
            known.receiving = True
            self._attempts.note(known.attempt, events.TRANSFER_START)


def _reservation_id(lease: int) -> str:
    return f"lease {lease}"
