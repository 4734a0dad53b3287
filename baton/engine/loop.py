"""The engine: one thread that takes commands, steps the model and reports.

Everything that an engine owns (blocks, queues, requests, KV cache, model) is touched by its thread only. Others post
commands; results leave through `Ports`, which are called on the engine thread and must not block. The thread sleeps
while nothing can run and is woken by the next command.

A step is launched, and lands when its tokens are read back. With overlap the next step is launched before: a decode's
input token then goes from draw to step on the device, and the host handles a step's tokens while the device computes.
The next step is planned without knowing these tokens, so a request that stops at one of them is computed once too
often; that result is dropped, and the blocks stay its own until that step has landed.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from baton.common import events
from baton.common.clock import Clock
from baton.common.sampling import TokenLogprobs
from baton.engine.announce import announcer
from baton.engine.batch import ScheduledStep
from baton.engine.block_pool import BlockPool
from baton.engine.book import RequestBook
from baton.engine.decode_path import DecodePath
from baton.engine.flight import Flight, Pacer
from baton.engine.inbox import Inbox
from baton.engine.layer_groups import LayerGroupPlan
from baton.engine.ports import Command, EngineStats, LinkMeasured, Ports, PrefillDone
from baton.engine.request import Phase, Request
from baton.engine.runner import Runner
from baton.engine.sampler import NOT_FINITE
from baton.engine.schedulers.base import Scheduler
from baton.engine.segments import num_completed_blocks
from baton.engine.step_log import StepLog

logger = logging.getLogger(__name__)

MAX_FAILURES_IN_A_ROW = 10  # what a step cannot mend, like memory in pieces, a new process does
_TOKEN_EVENTS = (events.FIRST_TOKEN, events.SECOND_TOKEN)


class Engine:
    """`start`, `stop`, `post`, `wake` and `stats` may be called from any thread; `stop` not from the engine's own."""

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        scheduler: Scheduler,
        ports: Ports,
        clock: Clock,
        *,
        layer_groups: LayerGroupPlan,
        max_model_len: int,
        overlap: bool = False,
        launch_lead_s: float | None = None,
    ) -> None:
        self.layout = runner.layout
        self.kv_cache = runner.kv_cache
        self.max_model_len = max_model_len
        self.vocab_size = runner.vocab_size
        self._runner = runner
        self._pool = pool
        self._scheduler = scheduler
        self._ports = ports
        self._clock = clock
        self._layer_groups = layer_groups
        self._log = StepLog(clock)
        self._book = RequestBook(pool, scheduler, self._log, max_model_len=max_model_len, vocab_size=runner.vocab_size)
        self._inbox = Inbox()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=False)
        self._flights: deque[Flight] = deque()
        self._max_flights = 1 if overlap else 0
        self._pacer = Pacer(self._inbox, clock, launch_lead_s)
        self._steps = 0
        self._failures_in_a_row = 0
        self._idle = True
        self._progress_at = clock.now()
        self._stats = self._snapshot()

    # ---- any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in flight. What is queued or running is dropped without a report."""
        self._inbox.close()
        if self._thread.ident is not None:
            self._thread.join()

    def post(self, command: Command) -> None:
        self._inbox.post(command)

    def wake(self) -> None:
        """Make an idle engine ask `Ports.ready_to_admit` again."""
        self._inbox.wake()

    def stats(self) -> EngineStats:
        age = 0.0 if self._idle else self._clock.now() - self._progress_at
        return replace(self._stats, progress_age=age)

    @property
    def decode_path(self) -> DecodePath | None:
        """For measurements."""
        return self._runner.decode_path

    def poison_fresh_blocks(self) -> None:
        """Fill every block with NaN when it is allocated, so that reading what nobody wrote shows. Before `start`."""
        self._pool.on_allocate = self._runner.fill_with_nan

    # ---- the engine thread

    def turn(self) -> bool:
        """Take commands, launch a step, land the one before, report. Returns whether there was anything to run.

        The engine thread does this over and over; a simulation does it instead of `start`.
        """
        for command in (*self._inbox.drain(), *self._ports.ready_to_admit()):
            self._handle(command)
        is_held = self._is_launch_held()
        has_launched = not is_held and self._may_launch() and self._launch_next()
        landed = None
        if not is_held and len(self._flights) > (self._max_flights if has_launched else 0):
            landed = self._land_next() if self._pacer.await_landing(self._flights[0]) else None
        if has_launched or landed is not None:  # commands alone are no progress
            self._progress_at = self._clock.now()
        self._stats = self._snapshot()
        if landed is not None or self._log:
            self._report(landed)
        return has_launched or landed is not None or bool(self._flights)

    def _run(self) -> None:
        try:
            with self._runner.on_this_thread():
                self._wait()
                while not self._inbox.is_closed():
                    if not self.turn():
                        self._wait()
                self._runner.settle()
        except Exception as error:
            logger.exception("the engine's thread ends")
            self._ports.on_lost(repr(error))

    def _wait(self) -> None:
        self._idle = True
        self._inbox.wait()
        self._progress_at = self._clock.now()
        self._idle = False

    def _handle(self, command: Command) -> None:
        try:
            if isinstance(command, LinkMeasured):
                self._layer_groups.set_link(command.speed)
            else:
                self._book.handle(command)
        except Exception as error:
            logger.exception("a command went wrong: %s", type(command).__name__)
            self._book.reject(command, repr(error))

    def _is_launch_held(self) -> bool:
        """An admission is expected and came, or other news did, before the next step had to be launched."""
        expecting = bool(self._flights) and self._book.has_reservations and self._may_launch()
        return expecting and self._pacer.hold_launch(self._flights[0])

    def _may_launch(self) -> bool:
        return len(self._flights) <= self._max_flights

    def _launch_next(self) -> bool:
        """Whether a step was planned. Where it goes wrong its requests fail."""
        started = self._clock.now()
        step: ScheduledStep | None = None
        try:
            step = self._scheduler.schedule()
            if step:
                self._flights.append(self._launch(step, started))
        except Exception as error:
            logger.exception("a step went wrong; its requests fail")
            self._fail(self._book.unfinished() if step is None else step.requests(), error)
        return bool(step)

    def _land_next(self) -> Flight:
        flight = self._flights.popleft()
        try:
            self._land(flight)
            self._steps += 1
            self._failures_in_a_row = 0
        except Exception as error:
            logger.exception("a step went wrong; its requests fail")
            self._fail(flight.step.requests(), error)
        return flight

    def _fail(self, requests: Iterable[Request], error: Exception) -> None:
        """Raises what the device reports, for such a device computes nothing any more, and where no step goes well."""
        self._failures_in_a_row += 1
        self._runner.settle()
        for request in list(requests):
            if request.phase in (Phase.WAITING, Phase.RUNNING):
                self._book.fail(request, "internal", repr(error))
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise RuntimeError(f"{self._failures_in_a_row} steps in a row went wrong") from error

    def _launch(self, step: ScheduledStep, started: float) -> Flight:
        for segment in step.prefills:
            if segment.is_first:
                self._log.event(segment.request.request_id, events.PREFILL_START)
        hand_overs = [segment for segment in step.prefills if segment.request.hand_over]
        num_blocks = num_completed_blocks(hand_overs, self._pool.block_size)
        groups = self._layer_groups.groups(num_blocks, step.num_prefill_tokens) if hand_overs else ()
        launched = self._runner.launch(step, groups, announcer(self._ports, hand_overs, self._pool.block_size))
        for segment in hand_overs:  # decode waits for what lands
            self._pool.register_soon(segment.request.request_id, segment.request.token_ids, segment.end)
        ends = tuple(r.num_computed_tokens + 1 for r in step.decodes) + tuple(s.end for s in step.prefills)
        for request, end in zip(step.requests(), ends, strict=True):
            request.num_computed_tokens = end
            request.steps_in_flight += 1
        for row, request in enumerate(step.sampled()):
            request.draw_row = row
        return Flight(step, ends, launched.tokens, launched.logprobs, started)

    def _land(self, flight: Flight) -> None:
        step = flight.step
        try:
            tokens = flight.tokens.wait()
            logprobs = flight.logprobs.land()
        finally:
            for request in step.requests():
                self._book.landed(request)
        drawn = [(r, token) for r, token in zip(step.sampled(), tokens, strict=True) if r.phase is Phase.RUNNING]
        self._advance(flight, {request.request_id for request, token in drawn if token == NOT_FINITE})
        for request, token in drawn:
            if token == NOT_FINITE:
                self._pool.distrust(request.request_id)
                self._book.fail(request, "internal", "the model's logits are not finite")
            else:
                known = logprobs.get(request.request_id)
                self._accept(request, token, () if known is None else (known,))

    def _advance(self, flight: Flight, broken: set[str]) -> None:
        """The step's tokens are computed: let others find the blocks that are full now."""
        for request, end in zip(flight.step.requests(), flight.ends, strict=True):
            if request.phase is Phase.RUNNING and request.request_id not in broken:
                self._pool.register(request.request_id, request.token_ids, end)
        for segment in flight.step.prefills:
            if segment.is_last and segment.request.phase is Phase.RUNNING:
                self._log.event(segment.request.request_id, events.PREFILL_END)

    def _accept(self, request: Request, token: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """A request's next token is drawn: it goes out, and may be the last."""
        request.token_ids.append(token)
        if request.num_output_tokens <= len(_TOKEN_EVENTS):
            self._log.event(request.request_id, _TOKEN_EVENTS[request.num_output_tokens - 1])
        reason = request.finish_reason()
        if request.hand_over:
            self._book.hand_over(request)
            name, of_prompt = request.request_id, tuple(request.prompt_logprobs)
            self._ports.on_prefill_done(
                PrefillDone(name, request.num_prompt_tokens, token, reason, logprobs, of_prompt)
            )
        elif reason is not None:
            self._book.finish(request, (token,), reason, logprobs)
        else:
            self._log.output(request, (token,), None, logprobs)

    def _report(self, landed: Flight | None) -> None:
        step = ScheduledStep() if landed is None else landed.step
        seconds = 0.0 if landed is None else self._pacer.landed(landed)
        if step.num_prefill_tokens:
            self._layer_groups.observe(step.num_prefill_tokens, seconds)
        report = self._log.take(step.num_prefill_tokens, len(step.decodes), seconds)
        try:
            self._ports.on_step(report)
        except Exception:
            logger.exception("the report of a step was not taken")

    def _snapshot(self) -> EngineStats:
        waiting, running = self._scheduler.waiting, self._scheduler.running
        return EngineStats(
            blocks=self._pool.counts(),
            num_waiting=len(waiting),
            num_running=len(running),
            queued_prefill_tokens=sum(
                max(0, r.num_prompt_tokens - r.num_computed_tokens) for r in (*waiting, *running)
            ),
            steps=self._steps,
            progress_age=0.0,
            failed_steps_in_a_row=self._failures_in_a_row,
        )
