"""The attempts that routers have placed on this worker, and all that is said about them.

Asyncio thread only. One table: an attempt is in it from its acceptance to its one terminal event (finish, failure,
refusal or cancel), so nothing can be said of it twice or afterwards (invariants I2, I8). What an ended attempt still
holds (blocks under transfer) is the business of the half that served it, not of this table.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from baton.common import events
from baton.common.clock import Clock
from baton.common.sampling import TokenLogprobs
from baton.engine.ports import LifecycleEvent, PrefillDone, TokenOutput
from baton.worker.session import RouterSession, engine_id
from baton.worker.spec import Spec
from kv_transfer.events import AttemptKey
from protos import worker_pb2 as pb

NOT_RETRYABLE = frozenset({"deadline"})


class AttemptOwner(Protocol):
    """Who serves an attempt and can take it back."""

    def cancel(self, attempt: Attempt) -> None:
        """The attempt has ended for the router: free what it holds, say nothing more. Asyncio thread."""
        ...


@dataclass(slots=True, eq=False)
class Attempt:
    """`key` is unique in this worker, `name` is the key as the router knows it. Times are the worker's clock."""

    session: RouterSession
    name: pb.AttemptKey
    key: AttemptKey
    spec: Spec
    owner: AttemptOwner
    accepted_at: float
    deadline: asyncio.TimerHandle | None = None
    unsent_events: list[pb.AttemptEvent] = field(default_factory=list)

    @property
    def engine_id(self) -> str:
        return engine_id(self.key)


class Attempts:
    """All live attempts by engine id."""

    def __init__(self, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        self._clock = clock
        self._loop = loop
        self._live: dict[str, Attempt] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._live)

    def get(self, id_: str) -> Attempt | None:
        return self._live.get(id_)

    async def wait_idle(self) -> None:
        """Returns once no attempt is live."""
        await self._idle.wait()

    def is_known(self, session: RouterSession, key: AttemptKey) -> bool:
        return engine_id(key) in self._live or session.has_ended(key)

    def accept(self, session: RouterSession, name: pb.AttemptKey, spec: Spec, owner: AttemptOwner) -> Attempt:
        """Enter a new attempt; its deadline starts now."""
        attempt = Attempt(session, name, session.key(name), spec, owner, self._clock.now())
        self._live[attempt.engine_id] = attempt
        self._idle.clear()
        if spec.deadline_s is not None:
            attempt.deadline = self._loop.call_later(spec.deadline_s, self._expire, attempt)
        self.note(attempt, events.ACCEPTED)
        return attempt

    # ---- what is said to the router

    def note(self, attempt: Attempt, name: str, at: float | None = None) -> None:
        """Record a lifecycle event at clock time `at` (now); it goes out with the next flush."""
        at_s = (self._clock.now() if at is None else at) - attempt.accepted_at
        attempt.unsent_events.append(pb.AttemptEvent(name=name, at_s=max(at_s, 0.0)))

    def note_all(self, lifecycle: Iterable[LifecycleEvent]) -> None:
        for event in lifecycle:
            if (attempt := self._live.get(event.request_id)) is not None:
                self.note(attempt, event.name, event.at)

    def flush(self, attempt: Attempt) -> None:
        """Send the events noted so far, in the order in which they happened."""
        if attempt.unsent_events:
            in_order = sorted(attempt.unsent_events, key=lambda event: event.at_s)
            attempt.session.send(pb.WorkerFrame(events=pb.AttemptEvents(key=attempt.name, events=in_order)))
            attempt.unsent_events = []

    def emit(self, outputs: Iterable[TokenOutput]) -> None:
        """Send one step's tokens: one frame per router. Outputs of unknown attempts are dropped."""
        frames: dict[RouterSession, pb.WorkerFrame] = defaultdict(pb.WorkerFrame)
        for output in outputs:
            if (attempt := self._live.get(output.request_id)) is not None:
                self._add_output(frames[attempt.session].step, attempt, output)
        for session, frame in frames.items():
            session.send(frame)

    def first_tokens(self, done: Iterable[PrefillDone]) -> list[TokenOutput]:
        """The tokens that prefills for other workers have drawn, as the engine would report those of its own."""
        live = [(self._live.get(prefill.request_id), prefill) for prefill in done]
        return [
            TokenOutput(
                prefill.request_id,
                attempt.spec.num_emitted,
                (prefill.first_token,),
                prefill.finish_reason,
                prefill.logprobs,
                prefill.prompt_logprobs,
            )
            for attempt, prefill in live
            if attempt is not None
        ]

    def refuse(self, attempt: Attempt, code: str, message: str, retry_after_s: float = 0.0) -> None:
        """End an attempt for which nothing was kept."""
        if self._remove(attempt):
            send_refusal(attempt.session, attempt.name, code, message, retry_after_s)

    def fail(self, attempt: Attempt, code: str, message: str) -> None:
        """End an attempt that was accepted and cannot finish."""
        if self._remove(attempt):
            self.note(attempt, events.FAILED)
            self.flush(attempt)
            failed = pb.AttemptFailed(key=attempt.name, code=code, message=message, retryable=code not in NOT_RETRYABLE)
            attempt.session.send(pb.WorkerFrame(failed=failed))

    def end(self, attempt: Attempt) -> None:
        """Take an attempt out of the table without a terminal frame: it goes on elsewhere, or was cancelled."""
        if self._remove(attempt):
            self.flush(attempt)

    # ---- what routers and time do

    def cancel(self, session: RouterSession, name: pb.AttemptKey) -> None:
        """The router withdraws an attempt. Unknown ones are remembered, so that a late command for them is ignored."""
        key = session.key(name)
        session.remember_ended(key)
        if (attempt := self._live.get(engine_id(key))) is not None:
            self._withdraw(attempt)

    def drop_session(self, session: RouterSession) -> None:
        """The router is gone: withdraw everything of it."""
        for attempt in [attempt for attempt in self._live.values() if attempt.session is session]:
            self._withdraw(attempt)

    def _withdraw(self, attempt: Attempt) -> None:
        self.note(attempt, events.CANCELLED)
        self.end(attempt)
        attempt.owner.cancel(attempt)

    def _expire(self, attempt: Attempt) -> None:
        self.fail(attempt, "deadline", f"the request's deadline of {attempt.spec.deadline_s:g} s passed")
        attempt.owner.cancel(attempt)

    def _add_output(self, step: pb.StepOutput, attempt: Attempt, output: TokenOutput) -> None:
        """In place: a frame put together of messages of its own takes twice as long, in every step."""
        if output.finish_reason is not None:
            self.end(attempt)
        else:
            self.flush(attempt)
        said = step.outputs.add(position=output.position, token_ids=output.token_ids)
        said.key.CopyFrom(attempt.name)
        if output.finish_reason is not None:
            said.finish_reason = output.finish_reason
        if output.logprobs or output.prompt_logprobs:
            said.logprobs.extend(map(_logprobs, output.logprobs))
            said.prompt_logprobs.extend(map(_logprobs, output.prompt_logprobs))

    def _remove(self, attempt: Attempt) -> bool:
        """False when the attempt has already ended."""
        if self._live.get(attempt.engine_id) is not attempt:
            return False
        del self._live[attempt.engine_id]
        attempt.session.remember_ended(attempt.key)
        if attempt.deadline is not None:
            attempt.deadline.cancel()
        if not self._live:
            self._idle.set()
        return True


def _logprobs(known: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=known.token_id,
        logprob=known.logprob,
        rank=known.rank,
        top_token_ids=[token for token, _ in known.top],
        top_logprobs=[logprob for _, logprob in known.top],
    )


def send_refusal(
    session: RouterSession, name: pb.AttemptKey, code: str, message: str, retry_after_s: float = 0.0
) -> None:
    """Answer a command for which nothing was kept; the key may be used no more."""
    session.remember_ended(session.key(name))
    refused = pb.Refused(key=name, code=code, message=message, retry_after_s=retry_after_s)
    session.send(pb.WorkerFrame(refused=refused))
