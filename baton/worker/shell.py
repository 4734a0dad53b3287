"""The shell of a worker, the same for every role: engine, gRPC server, routers' streams, start, drain and stop.

Created and driven by an actor (or a test) on one asyncio loop; every callback of the engine is brought to that loop.
What the worker can do beyond local generation depends only on the halves that are attached.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import grpc.aio
import torch

from baton.common.clock import Clock, MonotonicClock
from baton.common.config import BatonConfig, EngineConfig, FaultSettings, TransferConfig
from baton.engine.kv_layout import KVLayout
from baton.engine.models.source import resolve_model
from baton.engine.ports import EngineStats, Ports, PrefillDone, SegmentWritten, StepReport
from baton.worker.attach_service import AttachService
from baton.worker.attempts import Attempts
from baton.worker.chaos_hooks import make_injector
from baton.worker.commands import CommandDispatcher
from baton.worker.engine_ports import EngineLost, EnginePorts, EngineResult
from baton.worker.faults import Faults
from baton.worker.generate import GenerateHalf
from baton.worker.half import EnginePort, Half, HalfFactory, WorkerContext
from baton.worker.mailbox import Mailbox
from baton.worker.spec import Limits
from baton.worker.stall_watch import watch_for_stall
from baton.worker.status import health, heartbeat
from baton.worker.step_timing import StepTimeModel
from baton.worker.streams import SERVER_OPTIONS
from baton.worker.tasks import Tasks
from kv_transfer.packing import warm_up
from kv_transfer.wire import layout_proto
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import add_WorkerServicer_to_server

logger = logging.getLogger(__name__)


class ServedEngine(EnginePort, Protocol):
    """What the shell needs of an engine."""

    layout: KVLayout
    max_model_len: int
    vocab_size: int

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def stats(self) -> EngineStats: ...


class EngineBuilder(Protocol):
    """Loads the model and allocates the KV cache; may take minutes."""

    def __call__(
        self,
        config: EngineConfig,
        transfer: TransferConfig,
        model_dir: Path,
        device: torch.device,
        ports: Ports,
        clock: Clock,
    ) -> ServedEngine: ...


def resolve_device(device: str) -> torch.device:
    """ "auto" is the GPU that this process sees, if any."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


class WorkerShell:
    """One worker process. `role` is what the worker tells routers; here it is a word and decides nothing.

    `on_lost` is told when the engine is lost or stands still: nothing here serves any more, only a new process will.
    """

    def __init__(
        self,
        config: BatonConfig,
        role: str,
        host: str,
        build: EngineBuilder,
        halves: Sequence[HalfFactory] = (),
        clock: Clock | None = None,
        on_lost: Callable[[str], None] = logger.critical,
    ) -> None:
        self.worker_id = f"{role}-{uuid.uuid4().hex[:12]}"
        self.address = ""
        self._config = config
        self._role = role
        self._host = host
        self._build = build
        self._factories = halves
        self._clock = clock or MonotonicClock()
        self._on_lost = on_lost
        self._timing = StepTimeModel()
        self._faults = Faults()
        self._tasks = Tasks(self._faults)
        self._injector = make_injector(config.chaos)
        self._prefills_done: list[PrefillDone] = []
        self._device = resolve_device(config.cluster.device)
        self._closed = asyncio.Event()
        self._stopping = False

    @property
    def transfer_address(self) -> str:
        """Where prefill workers connect, once started; empty where no half receives KV."""
        return next((half.transfer_address for half in self._halves if half.transfer_address), "")

    async def start(self) -> None:
        """Load the model, start the engine, listen on a free port of `host`. Afterwards `address` is set."""
        loop = asyncio.get_running_loop()
        self._mailbox = Mailbox[EngineResult](loop, self._on_result, self._faults)
        self._engine = await asyncio.to_thread(self._build_engine)
        self._attempts = Attempts(self._clock, loop)
        self._halves = self._make_halves(loop)
        self._dispatcher = CommandDispatcher(self._attempts, self._limits(), self._halves)
        self._engine.start()
        try:
            for half in self._halves:
                await half.start()
            await self._serve()
        except BaseException:
            for half in self._halves:
                await half.stop()
            await self._stop_engine()
            raise
        self._watch_engine()
        logger.info("worker %s listens on %s, %s", self.worker_id, self.address, self._device)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new attempts and wait for the running ones; False when some are left after `timeout_s`."""
        self._dispatcher.draining = True
        try:
            await asyncio.wait_for(self._attempts.wait_idle(), timeout_s)
        except TimeoutError:
            logger.warning("%d attempts are left after draining for %g s", len(self._attempts), timeout_s)
            return False
        return True

    async def stop(self) -> None:
        """End everything, in the order in which one part uses the other. Idempotent."""
        if self._stopping:
            await self._closed.wait()
            return
        self._stopping = True
        self._dispatcher.draining = True
        self._attach.end_all("the worker stops")
        await self._tasks.cancel_all()
        for half in self._halves:
            await half.stop()
        await self._server.stop(grace=0.5)
        await self._stop_engine()
        self._closed.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    def health(self) -> dict[str, object]:
        """Progress-based: `healthy` is false when the engine has work and does not step."""
        stats = self._engine.stats()
        healthy, reason = health(stats, self._faults.count)
        return {
            "healthy": healthy,
            "reason": reason,
            "worker_id": self.worker_id,
            "role": self._role,
            "address": self.address,
            "num_attempts": len(self._attempts),
            "num_waiting": stats.num_waiting,
            "num_running": stats.num_running,
            "steps": stats.steps,
        }

    def inject(self, settings: FaultSettings) -> None:
        """Disturb this worker's KV connections from now on. Raises ConfigError unless `chaos.enabled`."""
        self._injector.set(settings)

    # ---- construction

    def _build_engine(self) -> ServedEngine:
        ports = EnginePorts(self._mailbox)
        config = self._config
        model_dir = resolve_model(config.model, config.revision)
        engine = self._build(config.engine, config.transfer, model_dir, self._device, ports, self._clock)
        warm_up(engine.kv_cache)
        return engine

    def _make_halves(self, loop: asyncio.AbstractEventLoop) -> list[Half]:
        local = GenerateHalf(self._engine, self._attempts, self._clock)
        context = WorkerContext(
            worker_id=self.worker_id,
            host=self._host,
            config=self._config,
            device=self._device,
            layout=self._engine.layout,
            engine=self._engine,
            attempts=self._attempts,
            local=local,
            faults=self._faults,
            injector=self._injector,
            clock=self._clock,
            loop=loop,
        )
        return [local, *(factory(context) for factory in self._factories)]

    def _limits(self) -> Limits:
        return Limits(self._engine.max_model_len, self._engine.vocab_size)

    async def _serve(self) -> None:
        self._attach = AttachService(
            self._dispatcher, self._attempts, self._halves, self._hello(), self._heartbeat, self._injector
        )
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        add_WorkerServicer_to_server(self._attach, self._server)
        port = self._server.add_insecure_port(f"{self._host}:0")
        self.address = f"{self._host}:{port}"
        await self._server.start()

    async def _stop_engine(self) -> None:
        await asyncio.to_thread(self._engine.stop)
        self._mailbox.close()

    # ---- what routers hear

    def _hello(self) -> pb.WorkerHello:
        return pb.WorkerHello(
            worker_id=self.worker_id,
            role=self._role,
            layout=layout_proto(self._engine.layout),
            max_model_len=self._engine.max_model_len,
            max_num_seqs=self._config.engine.max_num_seqs,
            num_blocks=self._engine.stats().blocks.total,
            max_num_batched_tokens=self._config.engine.max_num_batched_tokens,
            device=str(self._device),
            transfer_address=self.transfer_address,
        )

    def _heartbeat(self, sequence: int) -> pb.WorkerHeartbeat:
        return heartbeat(sequence, self._engine.stats(), self._timing.fit(), self._halves)

    # ---- what the engine reports

    def _on_result(self, result: EngineResult) -> None:
        match result:
            case SegmentWritten():
                for half in self._halves:
                    half.on_segment(result)
            case PrefillDone():
                self._prefills_done.append(result)
            case StepReport():
                self._on_step(result)
            case EngineLost(reason):
                self._on_engine_lost(reason)

    def _on_engine_lost(self, reason: str) -> None:
        self._faults.add()
        self._on_lost(f"the engine is lost: {reason}")

    def _watch_engine(self) -> None:
        timeout_s = self._config.engine.stall_timeout_s
        if timeout_s is not None:
            watching = watch_for_stall(self._engine.stats, timeout_s, self._on_engine_lost)
            self._tasks.spawn(watching, "watch for a stalled engine")

    def _on_step(self, report: StepReport) -> None:
        """First tokens of hand-overs leave here, in the frame of the step that made them, before anything ends."""
        done, self._prefills_done = self._prefills_done, []
        self._timing.add(report.num_prefill_tokens, report.num_decode_seqs, report.seconds)
        self._attempts.note_all(report.events)
        self._attempts.emit([*self._attempts.first_tokens(done), *report.outputs])
        for half in self._halves:
            for prefill in done:
                half.on_prefill_done(prefill)
            for failure in report.failures:
                half.on_failure(failure)
