"""One worker process of the transfer bench: a real worker, without Ray, that also answers the bench's own questions.

`python -m benchmarks.transfer.probe ROLE`: one JSON request per line on standard input, one JSON answer per line on
what was standard output at the start; other output goes to standard error. Ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import uvloop

from baton.common.clock import Clock
from baton.common.config import BatonConfig, EngineConfig, TransferConfig
from baton.engine.build import build_engine
from baton.engine.ports import Ports
from baton.worker.half import Half, HalfFactory, WorkerContext
from baton.worker.interpreter import freeze_heap, shorten_turns
from baton.worker.shell import WorkerShell, resolve_device
from benchmarks.transfer.hops import Hops
from benchmarks.transfer.observe import Marks, ObservedEngine, ObservedPorts, WorkerLog
from benchmarks.transfer.packing import pack_seconds
from benchmarks.transfer.raw import RawLink
from decode_worker.handover import DecodeHalf
from kv_transfer.connection import connect, resolve_backend
from kv_transfer.rendezvous import StoreServer, connect_store
from kv_transfer.transport import PairTransport, TransferError
from prefill_worker.handover import PrefillHalf

HALVES: dict[str, HalfFactory] = {"prefill": PrefillHalf, "decode": DecodeHalf}
RANKS = {"decode": 0, "prefill": 1}
_STORE_TIMEOUT_S = 20.0


class Probe:
    """The worker and what is asked of it. Runs on the asyncio thread; what blocks goes to a thread."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._rank = RANKS[role]

    async def start(self, config: dict[str, Any], max_ctas: int, hops: bool) -> dict[str, Any]:
        """Build the engine with random weights and serve. Of the model only config.json is read."""
        started = time.monotonic()
        self._hops = Hops(self._role) if hops else None
        settings = BatonConfig.model_validate(config)
        self._host = settings.cluster.worker_host or "127.0.0.1"
        self._device = resolve_device(settings.cluster.device)
        self._settings, self._max_ctas = settings, max_ctas
        self._backend = resolve_backend(settings.transfer.backend, self._device)
        self._log = WorkerLog(Marks(self._device))
        self._since, self._cpu = 0.0, (0.0, 0.0)
        self._shell = WorkerShell(settings, self._role, self._host, self._build, [self._half])
        await self._shell.start()
        freeze_heap()
        self._server: StoreServer | None = None
        self._raw: RawLink | None = None
        self._transport: PairTransport | None = None
        return {
            "worker_id": self._shell.worker_id,
            "address": self._shell.address,
            "transfer_address": self._shell.transfer_address,
            "seconds": time.monotonic() - started,
            "dtype": self._engine.layout.dtype,
            "block_bytes": self._engine.layout.block_bytes,
            "num_layers": self._engine.layout.num_layers,
            "num_blocks": self._engine.kv_cache.shape[2],
            "gpu": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else None,
        }

    def _build(
        self,
        config: EngineConfig,
        transfer: TransferConfig,
        model_dir: Path,
        device: torch.device,
        ports: Ports,
        clock: Clock,
    ) -> ObservedEngine:
        observed = ObservedPorts(ports, self._log)
        engine = build_engine(config, transfer, model_dir, device, observed, clock, random_weights=True)
        for layer in engine.kv_cache:
            layer.normal_()  # real contexts are not zero, and the memory system is faster on zeros
        observed.layout = engine.layout
        self._engine = ObservedEngine(engine, self._log)
        return self._engine

    def _half(self, context: WorkerContext) -> Half:
        half = HALVES[self._role](context)
        self._timeline = half.timeline if isinstance(half, DecodeHalf) else None
        return half

    # ---- measurements beside the load

    async def reset(self) -> None:
        """Forget what was noted so far."""
        await self.clear_log()

    async def log(self) -> dict[str, Any]:
        """What was noted since the last `reset` or `clear_log`, and the chunks of the latest hand-overs.

        `cpu`: processor seconds since then, of the asyncio thread and of the process.
        """
        cpu = [now - before for now, before in zip(_cpu_seconds(), self._cpu, strict=True)]
        noted = await asyncio.to_thread(self._log.as_json)
        noted["cpu"] = {"loop": cpu[0], "process": cpu[1]}
        noted["hops"] = [] if self._hops is None else self._hops.take()
        if self._timeline is not None:
            noted["chunks"] = [asdict(chunk) for chunk in self._timeline.chunks() if chunk.announced_at > self._since]
        return noted

    async def clear_log(self) -> None:
        self._log.clear()
        self._since, self._cpu = time.monotonic(), _cpu_seconds()

    async def memory(self) -> int:
        """Free bytes of the GPU; 0 without one."""
        if self._device.type != "cuda":
            return 0
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])

    async def health(self) -> dict[str, Any]:
        return self._shell.health()

    async def pack_seconds(self, layers: int) -> dict[str, float]:
        slot_bytes = self._settings.transfer.slot_bytes
        engine = self._engine
        return await asyncio.to_thread(pack_seconds, engine.kv_cache, engine.layout, slot_bytes, layers)

    # ---- the transport alone

    async def open_store(self) -> dict[str, Any]:
        self._server = StoreServer(self._host)
        return {"host": self._server.host, "port": self._server.port}

    async def join_store(self, host: str, port: int) -> None:
        self._store = (
            self._server.store
            if self._server is not None
            else await asyncio.to_thread(connect_store, host, port, _STORE_TIMEOUT_S)
        )

    async def raw_join(self, name: str) -> None:
        device = self._device if self._backend == "nccl" else torch.device("cpu")
        self._raw = await asyncio.to_thread(RawLink, self._store, name, self._rank, self._host, device, self._max_ctas)

    async def raw_move(self, count: int, num_bytes: int) -> float:
        assert self._raw is not None
        return await asyncio.to_thread(self._raw.move, count, num_bytes)

    async def raw_post(self) -> None:
        assert self._raw is not None
        await asyncio.to_thread(self._raw.post)

    async def raw_finish(self) -> None:
        assert self._raw is not None
        await asyncio.to_thread(self._raw.finish)

    # ---- one epoch of our connection, beside the pairs of the worker

    async def join(self, epoch: str, operation_timeout_s: float) -> float:
        """Seconds to connect."""
        started = time.monotonic()
        transfer = self._settings.transfer

        def call() -> PairTransport:
            return connect(
                self._backend,
                self._store,
                epoch,
                self._rank,
                host=self._host,
                device=self._device,
                connect_timeout_s=transfer.connect_timeout_s,
                operation_timeout_s=operation_timeout_s,
                max_ctas=self._max_ctas,
            )

        self._transport = await asyncio.to_thread(call)
        return time.monotonic() - started

    async def close(self, with_receive: bool) -> float:
        """Seconds that destroying the epoch takes; `with_receive`: with a posted, unmatched receive in flight."""
        assert self._transport is not None
        transport, self._transport = self._transport, None
        receiving = asyncio.create_task(asyncio.to_thread(self._receive, transport)) if with_receive else None
        if receiving is not None:
            await asyncio.wait([receiving], timeout=0.2)
        started = time.monotonic()
        await asyncio.to_thread(transport.close)
        if receiving is not None:
            await receiving
        return time.monotonic() - started

    def _receive(self, transport: PairTransport) -> None:
        try:
            transport.start_recv(torch.zeros(1 << 20, dtype=torch.uint8, device=self._device)).wait()
        except TransferError:
            return
        raise RuntimeError("a receive that nobody sent to came to its end")

    async def stop(self) -> None:
        await self._shell.stop()


def _cpu_seconds() -> tuple[float, float]:
    return time.thread_time(), time.process_time()


async def answer(probe: Probe, line: str) -> dict[str, Any]:
    request = json.loads(line)
    method: Callable[..., Awaitable[Any]] = getattr(probe, request["call"])
    try:
        return {"result": await method(**request["arguments"])}
    except Exception as error:  # noqa: BLE001 (the bench gets it and says which call it was)
        return {"error": f"{type(error).__name__}: {error}"}


async def main(role: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    shorten_turns()
    probe = Probe(role)
    while line := await asyncio.to_thread(sys.stdin.readline):
        answers.write(json.dumps(await answer(probe, line)) + "\n")
        answers.flush()
    # What hangs in a communication library must not keep the process.
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
