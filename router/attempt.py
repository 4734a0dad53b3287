"""One try at one request, on one worker (local) or on two (remote).

    local:  Generate ──────────────────────────────▶ tokens … finish
            (with `fork_of`, the attempt on that worker whose prompt it shares)
    remote: Open ▶ Reserved ▶ Prefill ▶ first token (prefill worker), the rest (decode worker)
            Open ▶ Refused

Made and awaited by the dispatcher; driven by frames that the sessions deliver. It ends exactly once; from then on it is
unknown to the sessions, so whatever a worker still says of it is dropped there (I8).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from baton.common import events
from baton.common.sampling import TokenLogprobs
from protos import worker_pb2 as pb
from router.record import RequestRecord
from router.token_fence import TokenFence
from router.types import TokenEvent
from router.worker_session import AttemptId, WorkerSession


class AttemptOwner(Protocol):
    """Takes what an attempt brings forth. Called on the event loop; must not block."""

    def on_tokens(self, news: TokenEvent) -> None:
        """The next tokens, each position once and in order, or the end."""
        ...

    def on_prompt_logprobs(self, logprobs: Sequence[pb.TokenLogprobs]) -> None:
        """Before the tokens with which they came. Not read yet: there may be very many."""
        ...

    def on_prompt_placed(self, worker_id: str) -> None:
        """The generating worker has the whole prompt's KV. May be told more than once."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """The request is complete."""

    reason: str
    code: ClassVar[str] = "finished"

    def __str__(self) -> str:
        return self.code


@dataclass(frozen=True, slots=True)
class Refused:
    """A worker did not take it and kept nothing. code: see worker.proto."""

    code: str
    message: str
    retry_after_s: float

    def __str__(self) -> str:
        return f"refused ({self.code}): {self.message}"


@dataclass(frozen=True, slots=True)
class Failed:
    """It was accepted and ended early. code: "worker_lost", or see AttemptFailed in worker.proto."""

    code: str
    message: str
    retryable: bool

    def __str__(self) -> str:
        return f"failed ({self.code}): {self.message}"


Outcome = Finished | Refused | Failed


class Attempt:
    """`outcome` is set once. `worker` generates; `prefill`, if any, computes the prompt for it first."""

    def __init__(
        self,
        attempt_id: AttemptId,
        spec: pb.RequestSpec,
        worker: WorkerSession,
        prefill: WorkerSession | None,
        record: RequestRecord,
        owner: AttemptOwner,
        fork_of: AttemptId | None = None,
    ) -> None:
        self.outcome: Outcome | None = None
        self._over = asyncio.Event()
        self._id = attempt_id
        self._key = pb.AttemptKey(request_id=attempt_id[0], attempt=attempt_id[1])
        self._spec = spec
        self._worker = worker
        self._prefill = prefill
        self._record = record
        self._owner = owner
        self._fork_of = fork_of
        self._logprobs: dict[int, TokenLogprobs] = {}  # by position, of tokens that wait in the fence
        self._fence = TokenFence(spec.num_emitted, spec.num_emitted + spec.max_tokens)
        self._told: list[WorkerSession] = []  # workers that know this attempt and have not said that it ended there
        self._reserved = False

    def start(self) -> None:
        """Send the first command."""
        num_tokens = len(self._spec.token_ids)
        if self._prefill is None:
            self._worker.enlist(self._id, self, num_tokens)
            self._tell(self._worker, pb.RouterFrame(generate=self._generate_command()))
            return
        self._worker.enlist(self._id, self, 0)
        self._prefill.enlist(self._id, self, num_tokens)
        command = pb.OpenCommand(key=self._key, spec=self._spec, prefill_worker_id=self._prefill.worker_id)
        self._record.mark(events.OPENED)
        self._tell(self._worker, pb.RouterFrame(open=command))

    def _generate_command(self) -> pb.GenerateCommand:
        command = pb.GenerateCommand(key=self._key, spec=self._spec)
        if self._fork_of is not None:
            command.fork_of.request_id, command.fork_of.attempt = self._fork_of
        return command

    async def wait(self) -> None:
        """Returns when the outcome is set."""
        await self._over.wait()

    def end(self, outcome: Outcome) -> Outcome:
        """Leave every worker, telling those that still know the attempt. The first call decides the outcome."""
        if self.outcome is None:
            self.outcome = outcome
            for session in self._told:
                session.send(pb.RouterFrame(cancel=pb.CancelCommand(key=self._key)))
            self._told.clear()
            self._worker.forget(self._id)
            if self._prefill is not None:
                self._prefill.forget(self._id)
            self._over.set()
        return self.outcome

    def _tell(self, session: WorkerSession, frame: pb.RouterFrame) -> None:
        self._told.append(session)
        session.send(frame)

    def _over_at(self, worker_id: str) -> None:
        """That worker ended the attempt by itself, so it needs no cancel."""
        self._told = [session for session in self._told if session.worker_id != worker_id]

    # ---- frames

    def on_reserved(self, worker_id: str, reserved: pb.Reserved) -> None:
        if self._prefill is None or self._reserved or worker_id != self._worker.worker_id:
            return
        self._reserved = True
        self._record.mark(events.RESERVED)
        command = pb.PrefillCommand(
            key=self._key,
            spec=self._spec,
            decode_worker_id=worker_id,
            lease=reserved.lease,
            generation=reserved.generation,
            num_cached_tokens=reserved.num_cached_tokens,
        )
        self._record.mark(events.PREFILL_SENT)
        self._tell(self._prefill, pb.RouterFrame(prefill=command))

    def on_refused(self, worker_id: str, refused: pb.Refused) -> None:
        self._over_at(worker_id)
        self.end(Refused(refused.code, refused.message, refused.retry_after_s))
        if refused.code == "busy":
            self._session(worker_id).refused_busy(refused.retry_after_s)

    def on_tokens(self, worker_id: str, output: pb.TokenOutput) -> None:
        if output.finish_reason:
            self._over_at(worker_id)
        if self._prefill is not None and worker_id == self._worker.worker_id:
            self._over_at(self._prefill.worker_id)  # decode speaks after the commit: prefill has nothing left to cancel
        start = self._fence.next_position
        self._keep_logprobs(output)
        tokens, finish_reason = self._fence.accept(output.position, output.token_ids, output.finish_reason)
        if worker_id == self._worker.worker_id:
            self._owner.on_prompt_placed(worker_id)
        if tokens:
            self._leave_prefill(worker_id)
        if tokens or finish_reason is not None:
            self._owner.on_tokens(TokenEvent(tokens, finish_reason, self._take_logprobs(start, len(tokens))))
        if finish_reason is not None:
            self.end(Finished(finish_reason))

    def _keep_logprobs(self, output: pb.TokenOutput) -> None:
        """They wait beside the tokens in the fence, which decides when these go out."""
        for offset, known in enumerate(output.logprobs):
            if output.position + offset >= self._fence.next_position:
                self._logprobs.setdefault(output.position + offset, read_logprobs(known))
        if output.prompt_logprobs and self._fence.next_position == 0:
            self._owner.on_prompt_logprobs(output.prompt_logprobs)

    def _take_logprobs(self, start: int, count: int) -> tuple[TokenLogprobs, ...]:
        if not self._logprobs:
            return ()
        return tuple(self._logprobs.pop(position) for position in range(start, start + count))

    def on_failed(self, worker_id: str, failed: pb.AttemptFailed) -> None:
        self._over_at(worker_id)
        self.end(Failed(failed.code, failed.message, failed.retryable))

    def on_worker_lost(self, worker_id: str) -> None:
        """The loss of a prefill worker whose first token is out is left to decode, which knows what it has received."""
        self._over_at(worker_id)
        if self.first_token_is_out and worker_id != self._worker.worker_id:
            return
        self.end(Failed("worker_lost", f"worker {worker_id} was lost", retryable=True))

    @property
    def first_token_is_out(self) -> bool:
        """Of the tokens of this attempt."""
        return self._fence.next_position > self._spec.num_emitted

    def _leave_prefill(self, worker_id: str) -> None:
        """Keep the predicted queues right, and leave the prefill worker once decode has taken over."""
        (self._prefill or self._worker).prefill_ended(self._id)
        if self._prefill is not None and worker_id == self._worker.worker_id:
            self._prefill.forget(self._id)

    def _session(self, worker_id: str) -> WorkerSession:
        return self._prefill if self._prefill is not None and worker_id == self._prefill.worker_id else self._worker


def read_logprobs(known: pb.TokenLogprobs) -> TokenLogprobs:
    """From the form of the wire."""
    top = tuple(zip(known.top_token_ids, known.top_logprobs, strict=False))
    return TokenLogprobs(known.token_id, known.logprob, known.rank, top)
