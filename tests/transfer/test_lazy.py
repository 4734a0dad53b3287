"""Pairs beyond those that a worker connects ahead: their process group is made when it is used."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import baton.worker.join
from baton.common.config import TransferConfig
from baton.worker.join import ConnectedAhead
from kv_transfer.connection import connect
from kv_transfer.lazy import LazyTransport
from kv_transfer.transport import PairTransport, Transfer, TransferError
from tests.support.worker_client import WorkerClient
from tests.transfer.handover_cluster import Cluster, cluster, config, prompt, spec, worker
from tests.transfer.io_support import WAIT_S

BYTE = torch.zeros(1, dtype=torch.uint8)


def test_only_so_many_pairs_connect_ahead_and_a_lost_one_makes_room() -> None:
    ahead = ConnectedAhead(2)
    assert [ahead.enter(name) for name in ("a", "b", "c", "a")] == [True, True, False, True]
    ahead.leave("c")
    assert not ahead.enter("c")
    ahead.leave("a")
    assert ahead.enter("c")


def test_close_ends_a_set_up_that_waits_for_its_peer() -> None:
    cancel, waiting = threading.Event(), threading.Event()

    def connect_alone() -> PairTransport:
        waiting.set()
        assert cancel.wait(WAIT_S)
        raise TransferError("cancelled")

    transport = LazyTransport(connect_alone, cancel)
    with ThreadPoolExecutor(1) as pool:
        receive = pool.submit(transport.start_recv, BYTE)
        assert waiting.wait(WAIT_S)
        transport.close()
        with pytest.raises(TransferError, match="given up"):
            receive.result(WAIT_S)
    with pytest.raises(TransferError, match="closed"):
        transport.start_send(BYTE)


class Connected:
    """A connection that came."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def start_send(self, buffer: torch.Tensor) -> Transfer:
        raise TransferError("used")

    start_recv = start_send

    def close(self) -> None:
        self.closed.set()


def test_close_does_not_wait_for_a_set_up_that_no_longer_listens_and_what_it_brings_is_closed() -> None:
    """As NCCL, whose set-up waits for a peer that was killed in it."""
    waiting, peer_came, late = threading.Event(), threading.Event(), Connected()

    def connect_deaf() -> PairTransport:
        waiting.set()
        assert peer_came.wait(WAIT_S)
        return late

    transport = LazyTransport(connect_deaf, threading.Event())
    with ThreadPoolExecutor(1) as pool:
        receive = pool.submit(transport.start_recv, BYTE)
        assert waiting.wait(WAIT_S)
        transport.close()
        with pytest.raises(TransferError, match="given up"):
            receive.result(WAIT_S)
    assert not late.closed.is_set()
    transport.close()
    peer_came.set()
    assert late.closed.wait(WAIT_S)


def test_close_closes_the_connection_that_was_made() -> None:
    made = Connected()
    transport = LazyTransport(lambda: made, threading.Event())
    with pytest.raises(TransferError, match="used"):
        transport.start_recv(BYTE)
    transport.close()
    assert made.closed.is_set()


def test_close_of_a_pair_that_was_never_used_makes_no_connection() -> None:
    def never() -> PairTransport:
        raise AssertionError("connected")

    transport = LazyTransport(never, threading.Event())
    transport.close()
    transport.close()


@asynccontextmanager
async def beyond_the_cap(model: Path, of_prefill: int, of_decode: int) -> AsyncIterator[tuple[Cluster, Cluster]]:
    """One prefill worker and two decode workers that register one after the other."""

    def limited(num_pairs: int) -> TransferConfig:
        return TransferConfig(window=3, slot_bytes=16384, num_pairs=num_pairs)

    there = config(model, transfer=limited(of_decode))
    async with (
        cluster(config(model, transfer=limited(of_prefill)), there) as one,
        worker(there, "decode") as decode,
        WorkerClient(decode.address) as to_decode,
    ):
        await to_decode.attached()
        other = replace(one, decode=decode, to_decode=to_decode)
        await one.connect()
        await other.connect()
        yield one, other


@pytest.mark.parametrize(("of_prefill", "of_decode", "ahead"), [(1, 4, 1), (4, 0, 0), (4, 4, 2)])
async def test_pairs_beyond_the_cap_join_at_their_first_hand_over(
    model: Path, monkeypatch: pytest.MonkeyPatch, of_prefill: int, of_decode: int, ahead: int
) -> None:
    joined: list[str] = []

    def noted(backend: str, store: object, epoch: str, rank: int, **options: object) -> PairTransport:
        joined.append(epoch)
        return connect(backend, store, epoch, rank, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(baton.worker.join, "connect", noted)
    async with beyond_the_cap(model, of_prefill, of_decode) as pairs:
        assert len(joined) == 2 * ahead
        for number, pair in enumerate(pairs):
            request = spec(prompt(60, number))
            tokens = await asyncio.wait_for(pair.remote(f"r{number}", request), WAIT_S)
            assert tokens == await pair.local(f"l{number}", request)
            await pair.at_rest()
        assert sorted(joined.count(epoch) for epoch in set(joined)) == [2, 2]
        await pairs[1].remote("again", spec(prompt(60, 7)))
        assert len(joined) == 4
