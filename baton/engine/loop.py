"""The engine: one thread that takes commands, steps the model and reports.

Everything that an engine owns (blocks, queues, requests, KV cache, model) is touched by its thread only. Others post
commands; results leave through `Ports`, which are called on the engine thread and must not block. The thread sleeps
while nothing can run and is woken by the next command.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

import torch

from baton.common import events
from baton.common.clock import Clock
from baton.engine.batch import PrefillSegment, ScheduledStep, build_batch
from baton.engine.block_pool import BlockPool
from baton.engine.book import RequestBook
from baton.engine.inbox import Inbox
from baton.engine.ports import Command, EngineStats, Ports, PrefillDone, SegmentWritten
from baton.engine.request import Phase, Request
from baton.engine.runner import OnLayerGroup, Runner
from baton.engine.sampler import NOT_FINITE
from baton.engine.schedulers.base import Scheduler
from baton.engine.segments import completed_blocks, split_layers
from baton.engine.step_log import StepLog

logger = logging.getLogger(__name__)

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
        layer_groups: int,
        max_model_len: int,
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
        self._groups = split_layers(runner.layout.num_layers, layer_groups)
        self._log = StepLog(clock)
        self._book = RequestBook(pool, scheduler, self._log, max_model_len=max_model_len, vocab_size=runner.vocab_size)
        self._inbox = Inbox()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=False)
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

    def poison_fresh_blocks(self) -> None:
        """Fill every block with NaN when it is allocated, so that reading what nobody wrote shows. Before `start`."""
        self._pool.on_allocate = self._runner.fill_with_nan

    # ---- the engine thread

    def turn(self) -> bool:
        """Take commands, run one step, report. Returns whether there was anything to run.

        The engine thread does this over and over; a simulation does it instead of `start`.
        """
        started = self._clock.now()
        for command in (*self._inbox.drain(), *self._ports.ready_to_admit()):
            self._handle(command)
        step = self._step()
        self._progress_at = self._clock.now()
        self._stats = self._snapshot()
        if step or self._log:
            self._report(step, self._progress_at - started)
        return bool(step)

    def _run(self) -> None:
        with self._runner.on_this_thread():
            self._wait()
            while not self._inbox.is_closed():
                if not self.turn():
                    self._wait()

    def _wait(self) -> None:
        self._idle = True
        self._inbox.wait()
        self._progress_at = self._clock.now()
        self._idle = False

    def _handle(self, command: Command) -> None:
        try:
            self._book.handle(command)
        except Exception as error:
            logger.exception("a command went wrong: %s", type(command).__name__)
            self._book.reject(command, repr(error))

    def _step(self) -> ScheduledStep:
        step: ScheduledStep | None = None
        try:
            step = self._scheduler.schedule()
            if step:
                self._execute(step)
                self._steps += 1
                self._failures_in_a_row = 0
        except Exception as error:
            logger.exception("a step went wrong; its requests fail")
            self._failures_in_a_row += 1
            for request in self._book.unfinished() if step is None else list(step.requests()):
                if request.phase in (Phase.WAITING, Phase.RUNNING):
                    self._book.fail(request, "internal", repr(error))
        return step if step is not None else ScheduledStep()

    def _execute(self, step: ScheduledStep) -> None:
        for segment in step.prefills:
            if segment.is_first:
                self._log.event(segment.request.request_id, events.PREFILL_START)
        hand_overs = [segment for segment in step.prefills if segment.request.hand_over]
        batch = build_batch(step, self._pool.block_size)
        sampled = step.sampled()
        tokens = self._runner.run(batch, sampled, self._groups if hand_overs else (), self._announcer(hand_overs))
        broken = {request.request_id for request, token in zip(sampled, tokens, strict=True) if token == NOT_FINITE}
        self._advance(step, broken)
        for request, token in zip(sampled, tokens, strict=True):
            if token == NOT_FINITE:
                self._book.fail(request, "internal", "the model's logits are not finite")
            else:
                self._accept(request, token)

    def _announcer(self, hand_overs: Sequence[PrefillSegment]) -> OnLayerGroup:
        """Tells the ports, layer group by layer group, which blocks of the hand-overs a step completes."""
        ranges = [(segment.request, *completed_blocks(segment, self._pool.block_size)) for segment in hand_overs]

        def on_layer_group(layer_start: int, layer_end: int, event: torch.cuda.Event | None) -> None:
            for request, start, end in ranges:
                if start < end:
                    blocks = tuple(request.block_table[start:end])
                    self._ports.on_layer_group(
                        SegmentWritten(request.request_id, layer_start, layer_end, start, end, blocks, event)
                    )

        return on_layer_group

    def _advance(self, step: ScheduledStep, broken: set[str]) -> None:
        """The step's tokens are computed: count them and let others find the blocks that are full now."""
        for request in step.decodes:
            self._computed(request, request.num_computed_tokens + 1, broken)
        for segment in step.prefills:
            self._computed(segment.request, segment.end, broken)
            if segment.is_last:
                self._log.event(segment.request.request_id, events.PREFILL_END)

    def _computed(self, request: Request, num_tokens: int, broken: set[str]) -> None:
        request.num_computed_tokens = num_tokens
        if request.request_id not in broken:
            self._pool.register(request.request_id, request.token_ids, num_tokens)

    def _accept(self, request: Request, token: int) -> None:
        """A request's next token is drawn: it goes out, and may be the last."""
        request.token_ids.append(token)
        if request.num_output_tokens <= len(_TOKEN_EVENTS):
            self._log.event(request.request_id, _TOKEN_EVENTS[request.num_output_tokens - 1])
        reason = request.finish_reason()
        if request.hand_over:
            self._book.hand_over(request)
            self._ports.on_prefill_done(PrefillDone(request.request_id, request.num_prompt_tokens, token, reason))
        elif reason is not None:
            self._book.finish(request, (token,), reason)
        else:
            self._log.output(request, (token,), None)

    def _report(self, step: ScheduledStep, seconds: float) -> None:
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
