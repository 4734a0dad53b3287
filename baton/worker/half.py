"""What a worker is made of: the context that its parts share, and the interface of a part ("half").

A worker's role is nothing but which halves are attached to its shell: one generates locally (on every worker), one
prefills and hands over, one receives and decodes. All methods run on the asyncio thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.common.clock import Clock
from baton.common.config import BatonConfig
from baton.engine.kv_layout import KVLayout
from baton.engine.ports import Command, PrefillDone, RequestFailed, SegmentWritten
from baton.worker.attempts import Attempt, AttemptOwner, Attempts
from baton.worker.chaos_hooks import Injector
from baton.worker.faults import Faults
from baton.worker.session import RouterSession
from kv_transfer.timeline import TransferTotals
from protos import worker_pb2 as pb

AttemptCommand = pb.GenerateCommand | pb.OpenCommand | pb.PrefillCommand
PeerCommand = pb.ConnectPeer | pb.DisconnectPeer


class EnginePort(Protocol):
    """What a half needs of the engine."""

    @property
    def kv_cache(self) -> torch.Tensor:
        """[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]"""
        ...

    def post(self, command: Command) -> None: ...


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Given to each half when the engine is up. `host` is the advertised address, the only one to listen on.

    `local` takes over attempts whose hand-over is complete. `injector` disturbs KV connections in chaos tests.
    """

    worker_id: str
    host: str
    config: BatonConfig
    device: torch.device
    layout: KVLayout
    engine: EnginePort
    attempts: Attempts
    local: AttemptOwner
    faults: Faults
    injector: Injector
    clock: Clock
    loop: asyncio.AbstractEventLoop


class Half(AttemptOwner, Protocol):
    """A part of a worker. `BaseHalf` has empty answers for what a part does not care about."""

    @property
    def commands(self) -> frozenset[str]:
        """Names of the RouterFrame fields that this half takes."""
        ...

    def begin(self, attempt: Attempt, command: AttemptCommand) -> None:
        """A new attempt, accepted and checked, that this half now serves and must end."""
        ...

    def on_peer_command(self, session: RouterSession, command: PeerCommand) -> None: ...

    def on_segment(self, segment: SegmentWritten) -> None: ...

    def on_prefill_done(self, done: PrefillDone) -> None:
        """A hand-over's prefill has ended; its first token is on its way to the router already."""
        ...

    def on_failure(self, failure: RequestFailed) -> None:
        """The engine ended a request. Every half hears of every failure and ignores those of others."""
        ...

    def on_router_attached(self, session: RouterSession) -> None: ...

    def on_router_lost(self, session: RouterSession) -> None:
        """After all attempts of this router were withdrawn."""
        ...

    @property
    def transfer_address(self) -> str:
        """Where prefill workers connect, host:port; empty of a half that receives nothing, and before `start`."""
        ...

    def staging_in_use(self) -> int:
        """Staging slots that hold or await a chunk."""
        ...

    def transfer_totals(self) -> TransferTotals | None:
        """What this half has received; None of a half that receives nothing."""
        ...

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """End every task, stream and thread of this half. The engine still runs; attempts may still be cancelled."""
        ...


HalfFactory = Callable[[WorkerContext], Half]


class BaseHalf:
    """Takes no command and cares about nothing."""

    commands: frozenset[str] = frozenset()

    def cancel(self, attempt: Attempt) -> None:
        raise NotImplementedError(f"{type(self).__name__} owns no attempt, so not {attempt.engine_id}")

    def begin(self, attempt: Attempt, command: AttemptCommand) -> None:
        raise NotImplementedError(f"{type(self).__name__} takes no {type(command).__name__} ({attempt.engine_id})")

    def on_peer_command(self, session: RouterSession, command: PeerCommand) -> None:
        raise NotImplementedError(f"{type(self).__name__} takes no {type(command).__name__} ({session.router_id})")

    def on_segment(self, segment: SegmentWritten) -> None:
        pass

    def on_prefill_done(self, done: PrefillDone) -> None:
        pass

    def on_failure(self, failure: RequestFailed) -> None:
        pass

    def on_router_attached(self, session: RouterSession) -> None:
        pass

    def on_router_lost(self, session: RouterSession) -> None:
        pass

    @property
    def transfer_address(self) -> str:
        return ""

    def staging_in_use(self) -> int:
        return 0

    def transfer_totals(self) -> TransferTotals | None:
        return None

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass
