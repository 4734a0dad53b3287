"""An engine that is driven turn by turn on the calling thread: nothing but the engine is in the measurement."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.common.clock import MonotonicClock
from baton.common.config import EngineConfig, TransferConfig
from baton.common.sampling import SamplingParams
from baton.engine.build import build_engine
from baton.engine.ports import (
    AddRequest,
    Admission,
    PrefillDone,
    Refusal,
    Reservation,
    Reserve,
    SegmentWritten,
    StepReport,
)
from baton.engine.request import Request
from benchmarks.engine.profile import kernel_times
from benchmarks.engine.workloads import Job

_REPLAYS = 20


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """Of one step. `seconds` from step to step, `device_seconds` without the host, `kernels` microseconds by name."""

    seconds: float
    device_seconds: float | None
    kernels: dict[str, float]


class CountingPorts:
    """Implements `Ports`. Nobody is handed over to."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_finished = 0
        self.failures: list[str] = []

    def on_layer_group(self, segment: SegmentWritten) -> None:
        raise AssertionError(f"nothing is handed over: {segment}")

    def on_prefill_done(self, done: PrefillDone) -> None:
        raise AssertionError(f"nothing is handed over: {done}")

    def on_step(self, report: StepReport) -> None:
        self.num_tokens += sum(len(output.token_ids) for output in report.outputs)
        self.num_finished += sum(output.finish_reason is not None for output in report.outputs)
        self.failures += [f"{failure.request_id}: {failure.reason}" for failure in report.failures]

    def ready_to_admit(self) -> Sequence[Admission]:
        return ()

    def on_lost(self, reason: str) -> None:
        raise AssertionError(f"an engine without a thread lost it: {reason}")


class DrivenEngine:
    """Built with random weights in the shape of `model_dir`/config.json. Call it on one thread only."""

    def __init__(self, config: EngineConfig, model_dir: Path, device: torch.device) -> None:
        started = time.perf_counter()
        self.ports = CountingPorts()
        self.engine = build_engine(
            config, TransferConfig(), model_dir, device, self.ports, MonotonicClock(), random_weights=True
        )
        self.start_seconds = time.perf_counter() - started
        # Real contexts are not zero, and the memory system is faster on zeros.
        for layer in self.engine.kv_cache:
            layer.normal_()
        self._numbers = random.Random(1)
        self._names = 0

    @property
    def max_tokens(self) -> int:
        return self.engine.stats().blocks.total * self.engine.layout.block_size

    def decode(self, batch: int, context: int, num_steps: int = 30, profiled: bool = False) -> DecodeTimes:
        """Steps that decode `batch` sequences around `context` tokens, which need no prefill."""
        self._admit(batch, context - num_steps // 2, num_steps + 30)
        for _ in range(5):
            self.engine.turn()
        started = time.perf_counter()
        for _ in range(num_steps):
            self.engine.turn()
        seconds = (time.perf_counter() - started) / num_steps
        kernels = kernel_times(self.engine.turn, 5) if profiled else {}
        device_seconds = self._replay_seconds()
        self.finish()
        return DecodeTimes(seconds, device_seconds, kernels)

    def first_token_seconds(self, num_tokens: int) -> float:
        """From the arrival of one prompt at an idle engine to its first token."""
        request = self._request(Job(num_tokens, 1))
        started = time.perf_counter()
        self.engine.post(AddRequest(request))
        self.finish()
        return time.perf_counter() - started

    def profiled_prefill(self, num_tokens: int) -> dict[str, float]:
        """Microseconds by kernel of one such prefill."""
        return kernel_times(lambda: self.first_token_seconds(num_tokens), 2)

    def run(self, jobs: Sequence[Job]) -> tuple[float, int]:
        """Seconds to serve all of them, and the tokens that came out."""
        requests = [self._request(job) for job in jobs]
        before = self.ports.num_tokens
        started = time.perf_counter()
        for request in requests:
            self.engine.post(AddRequest(request))
        self.finish()
        return time.perf_counter() - started, self.ports.num_tokens - before

    def finish(self) -> None:
        """Turn until nothing is left. Raises RuntimeError if a request failed."""
        while self.engine.turn():
            pass
        failures, self.ports.failures = self.ports.failures, []
        if failures:
            raise RuntimeError("; ".join(failures[:3]))

    def _admit(self, batch: int, num_prompt_tokens: int, max_tokens: int) -> None:
        """All at once: commands are taken together at the start of a turn."""
        replies: list[Reservation | Refusal] = []
        for _ in range(batch):
            request = self._request(Job(num_prompt_tokens, max_tokens))
            prompt, lease = list(request.token_ids), f"lease-{request.request_id}"
            self.engine.post(Reserve(lease, prompt, request.max_total_tokens, replies.append))
            self.engine.post(Admission(lease, request, 1))
        self.engine.turn()
        refusals = [reply.reason for reply in replies if isinstance(reply, Refusal)]
        if refusals:
            self.ports.failures.clear()
            self.finish()
            raise RuntimeError(refusals[0])

    def _replay_seconds(self) -> float | None:
        """The device's time for the last step alone, where steps are graphs."""
        path = self.engine.decode_path
        if path is None:
            return None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        path.replay_last()
        start.record()
        for _ in range(_REPLAYS):
            path.replay_last()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / _REPLAYS

    def _request(self, job: Job) -> Request:
        return Request(self._name(), self._prompt(job.num_in), _sampling(job.num_out), 0.0)

    def _prompt(self, length: int) -> list[int]:
        return self._numbers.choices(range(self.engine.vocab_size), k=length)

    def _name(self) -> str:
        self._names += 1
        return f"r{self._names}"


def _sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)
