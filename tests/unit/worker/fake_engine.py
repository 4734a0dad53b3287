"""An engine that does what a test says: remembers commands, reports what it is told to report."""

from __future__ import annotations

from pathlib import Path

import torch

from baton.common.clock import Clock
from baton.common.config import BatonConfig, EngineConfig, TransferConfig
from baton.engine.kv_layout import KVLayout
from baton.engine.ports import (
    Abort,
    AddRequest,
    BlockCounts,
    Command,
    EngineStats,
    Ports,
    RequestFailed,
    StepReport,
    TokenOutput,
)

LAYOUT = KVLayout("hash", "float32", 16, 2, 2, 8)
CONFIG = BatonConfig(model=".")


class FakeEngine:
    """Its methods are called like an engine's, from any thread."""

    max_model_len = 64
    vocab_size = 100

    def __init__(self, ports: Ports) -> None:
        self.ports = ports
        self.layout = LAYOUT
        self.kv_cache = LAYOUT.allocate(8, torch.device("cpu"))
        self.commands: list[Command] = []
        self.blocks = BlockCounts(8, 0, 0, 0, 0, 8)
        self.running = False

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False

    def post(self, command: Command) -> None:
        self.commands.append(command)

    def stats(self) -> EngineStats:
        return EngineStats(self.blocks, 0, 0, 0, 0, 0.0)

    @property
    def added(self) -> list[str]:
        return [command.request.request_id for command in self.commands if isinstance(command, AddRequest)]

    @property
    def aborted(self) -> list[str]:
        return [command.request_id for command in self.commands if isinstance(command, Abort)]

    def step(self, *outputs: TokenOutput, failures: tuple[RequestFailed, ...] = ()) -> None:
        self.ports.on_step(StepReport(outputs, (), failures, 0, len(outputs), 0.01))


class FakeBuilder:
    """Builds the engine that the test then finds in `engine`."""

    engine: FakeEngine

    def __call__(
        self,
        config: EngineConfig,
        transfer: TransferConfig,
        model_dir: Path,
        device: torch.device,
        ports: Ports,
        clock: Clock,
    ) -> FakeEngine:
        self.engine = FakeEngine(ports)
        return self.engine
