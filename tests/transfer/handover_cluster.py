"""A prefill and a decode worker in this process, real in all but Ray, and a router's two streams to drive them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baton.common.config import BatonConfig, EngineConfig, RouterConfig, TransferConfig
from baton.engine.build import build_engine
from baton.worker.half import HalfFactory
from baton.worker.pair import Pair
from baton.worker.shell import WorkerShell
from decode_worker.handover import DecodeHalf
from kv_transfer.events import Unpack
from kv_transfer.receiver import RecvLink
from kv_transfer.timeline import Timeline
from prefill_worker.handover import PrefillHalf
from protos import worker_pb2 as pb
from protos.transfer_pb2 import DecodeFrame
from tests.support.worker_client import WorkerClient

HOST = "127.0.0.1"
HALVES: dict[str, list[HalfFactory]] = {"prefill": [PrefillHalf], "decode": [DecodeHalf]}
Key = tuple[str, int]


def config(model: Path, **sections: object) -> BatonConfig:
    """Small blocks and slots, so that a prompt of a hundred tokens takes dozens of chunks."""
    defaults: dict[str, object] = {
        "engine": EngineConfig(max_num_batched_tokens=32, max_num_seqs=16, num_blocks=64),
        "transfer": TransferConfig(window=3, slot_bytes=16384, connect_timeout_s=20.0, operation_timeout_s=2.0),
        "router": RouterConfig(heartbeat_interval_s=0.05, heartbeat_timeout_s=2.0),
    }
    return BatonConfig(model=str(model), **{**defaults, **sections})


def spec(token_ids: list[int], max_tokens: int = 8, **fields: object) -> pb.RequestSpec:
    values: dict[str, object] = {"token_ids": token_ids, "max_tokens": max_tokens, "top_p": 1.0, **fields}
    return pb.RequestSpec(**values)  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(7 * position + 31 * seed + position * position) % 250 for position in range(length)]


@dataclass
class Cluster:
    """The workers and the router's two streams."""

    prefill: WorkerShell
    decode: WorkerShell
    to_prefill: WorkerClient
    to_decode: WorkerClient

    async def connect(self, times: int = 1) -> None:
        """Have the prefill worker connect, and wait until it says so."""
        await self.want_connection()
        await self.peer_state("connected", times)

    async def want_connection(self) -> None:
        peer = pb.ConnectPeer(worker_id=self.decode.worker_id, address=self.decode.transfer_address)
        await self.to_prefill.send(connect_peer=peer)

    async def peer_state(self, state: str, times: int = 1) -> pb.PeerState:
        """Wait until the prefill worker has said this of the decode worker so many times."""
        client, wanted = self.to_prefill, (self.decode.worker_id, state)
        await client.until(lambda: client.peer_history.count(wanted) == times, f"peer {state}")
        return client.peer_states[self.decode.worker_id]

    async def local(self, request_id: str, request: pb.RequestSpec) -> list[int]:
        return await self.to_decode.finished(await self.to_decode.generate(request_id, request))

    async def open(self, request_id: str, request: pb.RequestSpec) -> pb.Reserved:
        key = await self.to_decode.open(request_id, request, self.prefill.worker_id)
        await self.to_decode.until(lambda: key in self.to_decode.reserved or key in self.to_decode.refused, "an answer")
        assert key not in self.to_decode.refused, self.to_decode.refused[key]
        return self.to_decode.reserved[key]

    async def begin(self, request_id: str, request: pb.RequestSpec) -> Key:
        """Open at decode, prefill at prefill."""
        reserved = await self.open(request_id, request)
        return await self.to_prefill.prefill(request_id, request, self.decode.worker_id, reserved)

    async def remote(self, request_id: str, request: pb.RequestSpec) -> list[int]:
        """The tokens of a request over both workers, in order of position."""
        return await self.finish(await self.begin(request_id, request))

    async def finish(self, key: Key) -> list[int]:
        """The first token comes from prefill, the others from decode."""
        prefill, decode = self.to_prefill, self.to_decode
        await prefill.until(lambda: bool(prefill.tokens[key]) or key in prefill.failed, f"first token of {key}")
        assert key not in prefill.failed, prefill.failed[key]
        first = prefill.in_order(key)
        assert len(first) == 1
        if key in prefill.finish_reasons:
            return first
        rest = await decode.finished(key)
        assert min(decode.tokens[key]) == min(prefill.tokens[key]) + 1
        return first + rest

    def never_stalled(self) -> None:
        """What the test holds up is not given up, however long the machine takes for all else."""
        for shell in (self.prefill, self.decode):
            for half in shell._halves:
                if isinstance(half, PrefillHalf | DecodeHalf):
                    protocol: Any = half._protocol
                    protocol.state = protocol.state._replace(stall_timeout=600.0)

    def timeline(self) -> Timeline:
        """What the decode worker measured."""
        [half] = [half for half in self.decode._halves if isinstance(half, DecodeHalf)]
        return half.timeline

    async def at_rest(self) -> None:
        await self.to_prefill.at_rest()
        await self.to_decode.at_rest()


@asynccontextmanager
async def worker(config: BatonConfig, role: str) -> AsyncIterator[WorkerShell]:
    shell = WorkerShell(config, role, HOST, build_engine, HALVES[role])
    await shell.start()
    try:
        yield shell
    finally:
        await shell.stop()
        assert shell.health()["healthy"], shell.health()


@asynccontextmanager
async def cluster(prefill_config: BatonConfig, decode_config: BatonConfig | None = None) -> AsyncIterator[Cluster]:
    """Both workers up, the router attached to both, no connection between them yet."""
    async with (
        worker(prefill_config, "prefill") as prefill,
        worker(decode_config or prefill_config, "decode") as decode,
        WorkerClient(prefill.address) as to_prefill,
        WorkerClient(decode.address) as to_decode,
    ):
        await asyncio.gather(to_prefill.attached(), to_decode.attached())
        yield Cluster(prefill, decode, to_prefill, to_decode)


class Unpacks:
    """Stands between the decode protocol and the unpacking of chunks: counts them, holds or spoils one of them."""

    def __init__(self, shell: WorkerShell) -> None:
        [self._half] = [half for half in shell._halves if isinstance(half, DecodeHalf)]
        self._original = self._half._unpack
        self._half._unpack = self._unpack  # type: ignore[method-assign]
        self.count = 0
        self.held = asyncio.Event()
        self._hold_at: int | None = None
        self._flip_at: int | None = None
        self._waiting: list[Unpack] = []

    def hold_from(self, chunk: int) -> None:
        """Keep the `chunk`-th unpack from now (from 0), and all later ones, until `release`."""
        self._hold_at = self.count + chunk

    def flip_bit(self, chunk: int) -> None:
        """Let one bit of the `chunk`-th unpack from now differ from what its fingerprint says."""
        self._flip_at = self.count + chunk

    def release(self) -> None:
        self._hold_at = None
        waiting, self._waiting = self._waiting, []
        for action in waiting:
            self._original(action)

    def drop(self) -> None:
        """Forget what is held: its epoch is gone."""
        self._hold_at = None
        self._waiting.clear()

    def pairs(self) -> list[Pair[DecodeFrame, RecvLink]]:
        """The live and dying epochs of the decode worker."""
        return list(self._half._pairs._pairs.values())

    def _unpack(self, action: Unpack) -> None:
        number = self.count
        self.count += 1
        if number == self._flip_at:
            action = replace(action, fingerprints=(action.fingerprints[0] ^ 4, *action.fingerprints[1:]))
        if self._hold_at is not None and number >= self._hold_at:
            self._waiting.append(action)
            self.held.set()
        else:
            self._original(action)
