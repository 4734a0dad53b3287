"""An engine in a test: built on a tiny checkpoint, driven turn by turn on the test's own thread."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from baton.common.clock import ManualClock
from baton.common.config import EngineConfig, TransferConfig
from baton.common.sampling import SamplingParams
from baton.engine.build import build_engine
from baton.engine.loop import Engine
from baton.engine.ports import (
    AddRequest,
    Admission,
    BlockCounts,
    Command,
    LifecycleEvent,
    PrefillDone,
    RequestFailed,
    Reservation,
    Reserve,
    SegmentWritten,
    StepReport,
)
from baton.engine.request import Request


@dataclass
class RecordingPorts:
    """Keeps all that an engine says. Tokens by request, checked to be at the next output position."""

    segments: list[SegmentWritten] = field(default_factory=list)
    prefills: list[PrefillDone] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    first_position: dict[str, int] = field(default_factory=dict)
    finish_reasons: dict[str, str] = field(default_factory=dict)
    to_admit: list[Admission] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def on_layer_group(self, segment: SegmentWritten) -> None:
        self.segments.append(segment)

    def on_prefill_done(self, done: PrefillDone) -> None:
        self.prefills.append(done)

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)
        for output in report.outputs:
            name = output.request_id
            assert name not in self.finish_reasons, f"{name} got a token after its end"
            first = self.first_position.setdefault(name, output.position)
            assert output.position == first + len(self.tokens[name]), f"{name}: position {output.position}"
            self.tokens[name].extend(output.token_ids)
            if output.finish_reason is not None:
                self.finish_reasons[name] = output.finish_reason

    def ready_to_admit(self) -> Sequence[Admission]:
        ready, self.to_admit = self.to_admit, []
        return ready

    def on_lost(self, reason: str) -> None:
        self.lost.append(reason)

    @property
    def failures(self) -> list[RequestFailed]:
        return [failure for report in self.reports for failure in report.failures]

    @property
    def events(self) -> list[LifecycleEvent]:
        return [event for report in self.reports for event in report.events]

    def events_of(self, request_id: str) -> list[str]:
        return [event.name for event in self.events if event.request_id == request_id]


@dataclass
class Harness:
    """An engine that is not started: `turn` and `run` do its thread's work. Fresh blocks hold NaN."""

    engine: Engine
    ports: RecordingPorts
    clock: ManualClock

    def post(self, *commands: Command) -> None:
        for command in commands:
            self.engine.post(command)

    def add(self, *requests: Request) -> None:
        self.post(*(AddRequest(request) for request in requests))

    def turn(self) -> bool:
        return self.engine.turn()

    def run(self, until: Callable[[], bool] = lambda: False, max_turns: int = 10_000) -> None:
        """Turn until nothing can run, or `until` holds."""
        for _ in range(max_turns):
            if until() or not self.engine.turn():
                return
        raise AssertionError(f"still running after {max_turns} turns")

    def generate(self, *requests: Request) -> dict[str, list[int]]:
        """Run requests to their end together; their tokens by id."""
        self.add(*requests)
        self.run()
        assert not self.ports.failures
        return {request.request_id: self.ports.tokens[request.request_id] for request in requests}

    def reserve(self, name: str, token_ids: list[int], max_total_tokens: int) -> Reservation:
        replies: list[object] = []
        self.post(Reserve(name, token_ids, max_total_tokens, replies.append))
        self.turn()
        assert len(replies) == 1
        assert isinstance(replies[0], Reservation), replies[0]
        return replies[0]

    @property
    def blocks(self) -> BlockCounts:
        return self.engine.stats().blocks

    def assert_at_rest(self) -> None:
        """Every block is free or cached, and none is lost."""
        counts = self.blocks
        assert (counts.running, counts.leased, counts.quarantined) == (0, 0, 0)
        assert counts.free + counts.cached == counts.total
        stats = self.engine.stats()
        assert (stats.num_waiting, stats.num_running, stats.queued_prefill_tokens) == (0, 0, 0)


def make_harness(model_dir: Path, layer_groups: int = 2, **settings: object) -> Harness:
    """`settings` are keys of EngineConfig."""
    ports, clock = RecordingPorts(), ManualClock()
    config = EngineConfig.model_validate({"num_blocks": 64, "max_model_len": 256, **settings})
    transfer = TransferConfig(layer_groups=layer_groups)
    engine = build_engine(config, transfer, model_dir, torch.device("cpu"), ports, clock)
    engine.poison_fresh_blocks()
    return Harness(engine, ports, clock)


def random_prompt(length: int, seed: int = 0, vocab_size: int = 256) -> list[int]:
    return random.Random(f"{seed} {length}").choices(range(vocab_size), k=length)


def greedy(name: str, token_ids: list[int], max_tokens: int = 32, **fields: object) -> Request:
    return make_request(name, token_ids, SamplingParams(max_tokens=max_tokens, temperature=0.0), **fields)


def seeded(name: str, token_ids: list[int], max_tokens: int = 32, seed: int = 7, **params: object) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed, **{"temperature": 1.0, **params})  # type: ignore[arg-type]
    return make_request(name, token_ids, sampling)


def make_request(name: str, token_ids: list[int], sampling: SamplingParams, **fields: object) -> Request:
    return Request(name, list(token_ids), sampling, 0.0, **fields)  # type: ignore[arg-type]
