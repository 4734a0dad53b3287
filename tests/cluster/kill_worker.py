"""A worker in a process of its own, on one GPU or none, that may kill itself (`tests.cluster.deaths`).

`python -m tests.cluster.kill_worker ROLE CONFIG_JSON DEATH`: once all is imported it waits for a line, then serves and
says "worker_id address". "memory" on its standard input is answered with the free bytes of its GPU, the input's end
with its health, and exit. Before the first line it touches no GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from baton.common.config import BatonConfig
from baton.engine.build import build_engine
from baton.worker.half import Half, WorkerContext
from baton.worker.interpreter import freeze_heap, shorten_turns
from baton.worker.shell import WorkerShell
from kv_transfer.connection import nccl_environment
from tests.cluster.deaths import arm
from tests.transfer.handover_cluster import HALVES, HOST

START_S, ANSWER_S = 120.0, 20.0


@dataclass
class KillWorker:
    """The test's handle on one. `died_at`: when it killed itself, on the machine's monotonic clock."""

    role: str
    death: str
    process: asyncio.subprocess.Process
    address: str = ""
    worker_id: str = ""
    died_at: float = 0.0
    _lines: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    _reader: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, role: str, config: BatonConfig, death: str, gpu: str | None) -> KillWorker:
        environment = {**os.environ, **nccl_environment(), "CUDA_VISIBLE_DEVICES": gpu or ""}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.cluster.kill_worker",
            role,
            config.model_dump_json(),
            death,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )
        worker = cls(role, death, process)
        worker._reader = asyncio.create_task(worker._read())
        return worker

    async def serve(self) -> None:
        """Let it begin, and wait until it serves."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"serve\n")
        self.worker_id, self.address = (await self._line(START_S)).split()

    async def died(self, timeout_s: float) -> None:
        """Wait for its death, which must be the planned one."""
        code = await asyncio.wait_for(self.process.wait(), timeout_s)
        assert self._reader is not None
        await self._reader
        assert code == -9, f"{self.role} with death {self.death} ended with {code}"
        assert self.died_at, f"{self.role} was killed by somebody else than itself"

    async def memory(self) -> int:
        """Free bytes of its GPU, by all processes; 0 without a GPU."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"memory\n")
        return int(await self._line(ANSWER_S))

    async def stop(self) -> dict[str, Any]:
        """Let it end in order; what it says of its health before."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        health: dict[str, Any] = json.loads(await self._line(ANSWER_S))
        assert await asyncio.wait_for(self.process.wait(), ANSWER_S) == 0
        return health

    async def kill(self) -> None:
        """End it whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        if self._reader is not None:
            await self._reader

    async def _line(self, timeout_s: float) -> str:
        return await asyncio.wait_for(self._lines.get(), timeout_s)

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            text = line.decode().strip()
            if text.startswith("dying "):
                self.died_at = float(text.split()[1])
            else:
                self._lines.put_nowait(text)


def free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


async def main(role: str, config: BatonConfig, death: str) -> None:
    torch.set_num_threads(1)
    shorten_turns()
    injector = arm(death)
    if not await asyncio.to_thread(sys.stdin.readline):
        return

    def half(context: WorkerContext) -> Half:
        [factory] = HALVES[role]
        return factory(replace(context, injector=injector))

    shell = WorkerShell(config, role, HOST, build_engine, [half])
    await shell.start()
    freeze_heap()
    print(shell.worker_id, shell.address, flush=True)
    device = torch.device("cuda", 0) if config.cluster.device == "cuda" else torch.device("cpu")
    while await asyncio.to_thread(sys.stdin.readline):
        print(await asyncio.to_thread(free_bytes, device), flush=True)
    health = shell.health()
    started = time.monotonic()
    await shell.stop()
    print(json.dumps({**health, "stop_s": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], BatonConfig.model_validate_json(sys.argv[2]), sys.argv[3]))
