"""What a worker of the transfer bench notes down beside its work, from outside: engine and ports are wrapped.

All times are seconds of the machine's monotonic clock, which its processes share. CUDA work is timed by events on the
stream that computes and put on that clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from baton.engine.kv_layout import KVLayout
from baton.engine.loop import Engine
from baton.engine.ports import Admission, Command, EngineStats, Ports, PrefillDone, SegmentWritten, StepReport
from kv_transfer.device_clock import clock_of, timing_event


class Marks:
    """Moments in the order of the device's work, put on the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clock = clock_of(device)

    def mark(self) -> torch.cuda.Event | float:
        """Now, in the order of the current stream's work."""
        if self._device.type != "cuda":
            return time.monotonic()
        event = timing_event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, mark: torch.cuda.Event | float) -> float:
        """When it was, on the host's clock. Waits for an event that has not fired."""
        if isinstance(mark, float):
            return mark
        mark.synchronize()
        seconds = self._clock.time_of(mark)
        if seconds is None:
            raise RuntimeError("the device's clock could not be compared with the host's")
        return seconds


@dataclass
class RequestLog:
    """One request of this worker's engine. `written`: when each announced segment was computed."""

    written: list[tuple[int, torch.cuda.Event | float]] = field(default_factory=list)
    events: dict[str, float] = field(default_factory=dict)
    admissible: float | None = None


class WorkerLog:
    """Written by the engine, transfer and asyncio threads of one worker, read between measurements."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self.requests: dict[str, RequestLog] = {}
            self.steps: list[tuple[float, float, int, int]] = []

    def request(self, engine_id: str) -> RequestLog:
        """By the router's name of the request: the engine's is "session/name/attempt"."""
        with self._lock:
            return self.requests.setdefault(engine_id.split("/")[1], RequestLog())

    def as_json(self) -> dict[str, Any]:
        """`steps`: (end, seconds, sequences that decoded, prompt tokens) each."""
        return {
            "requests": {name: self._request_json(request) for name, request in self.requests.items()},
            "steps": self.steps,
        }

    def _request_json(self, request: RequestLog) -> dict[str, Any]:
        written = [(bytes_, self.marks.seconds(mark)) for bytes_, mark in request.written]
        return {"written": written, "events": request.events, "admissible": request.admissible}


class ObservedPorts:
    """See `Ports`. Notes, then passes on."""

    def __init__(self, ports: Ports, log: WorkerLog) -> None:
        self._ports = ports
        self._log = log
        self.layout: KVLayout | None = None

    def on_layer_group(self, segment: SegmentWritten) -> None:
        assert self.layout is not None
        layers, blocks = segment.layer_end - segment.layer_start, segment.block_end - segment.block_start
        num_bytes = self.layout.segment_bytes(layers, blocks)
        self._log.request(segment.request_id).written.append((num_bytes, self._log.marks.mark()))
        self._ports.on_layer_group(segment)

    def on_prefill_done(self, done: PrefillDone) -> None:
        self._ports.on_prefill_done(done)

    def on_step(self, report: StepReport) -> None:
        self._log.steps.append((time.monotonic(), report.seconds, report.num_decode_seqs, report.num_prefill_tokens))
        for event in report.events:
            self._log.request(event.request_id).events.setdefault(event.name, event.at)
        self._ports.on_step(report)

    def ready_to_admit(self) -> Sequence[Admission]:
        return self._ports.ready_to_admit()

    def on_lost(self, reason: str) -> None:
        self._ports.on_lost(reason)


class ObservedEngine:
    """What a worker's shell needs of an engine. An Admission is posted when a hand-over is verified and committed."""

    def __init__(self, engine: Engine, log: WorkerLog) -> None:
        self.layout = engine.layout
        self.max_model_len = engine.max_model_len
        self.vocab_size = engine.vocab_size
        self.kv_cache = engine.kv_cache
        self._engine = engine
        self._log = log

    def start(self) -> None:
        self._engine.start()

    def stop(self) -> None:
        self._engine.stop()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def post(self, command: Command) -> None:
        if isinstance(command, Admission):
            self._log.request(command.request.request_id).admissible = time.monotonic()
        self._engine.post(command)
