"""A worker that dies or stands still amid a transfer, as its peer and the router see it. It has its own process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from baton.worker.shell import WorkerShell
from protos import worker_pb2 as pb
from tests.support.worker_client import WorkerClient
from tests.transfer.handover_cluster import Key, Unpacks, config, prompt, spec, worker
from tests.transfer.worker_process import RemoteWorker, worker_process

pytestmark = pytest.mark.slow
LONG, SHORT = spec(prompt(200)), spec(prompt(50, seed=1))


@pytest.fixture
async def decode(model: Path) -> AsyncIterator[WorkerShell]:
    async with worker(config(model), "decode") as shell:
        yield shell


@pytest.fixture
async def to_decode(decode: WorkerShell) -> AsyncIterator[WorkerClient]:
    async with WorkerClient(decode.address) as client:
        yield client


async def connect(prefill: WorkerClient, decode_id: str, address: str) -> None:
    await prefill.send(connect_peer=pb.ConnectPeer(worker_id=decode_id, address=address))
    await prefill.until(lambda: (decode_id, "connected") in prefill.peer_history, "the connection")


async def reserve(to_decode: WorkerClient, name: str, request: pb.RequestSpec, prefill_id: str) -> pb.Reserved:
    key = await to_decode.open(name, request, prefill_id)
    await to_decode.until(lambda: key in to_decode.reserved, "the reservation")
    return to_decode.reserved[key]


async def begin(name: str, prefill: RemoteWorker, decode: WorkerShell, to_decode: WorkerClient) -> Key:
    """Start handing over the long request."""
    await connect(prefill.client, decode.worker_id, decode.transfer_address)
    reserved = await reserve(to_decode, name, LONG, prefill.worker_id)
    return await prefill.client.prefill(name, LONG, decode.worker_id, reserved)


async def lost(client: WorkerClient, *keys: Key) -> None:
    await client.until(lambda: set(keys) <= client.failed.keys(), "word of the loss")
    assert {client.failed[key].code for key in keys} == {"peer_lost"}


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=lambda fault: fault.name)
async def test_decode_frees_what_a_lost_prefill_worker_held(
    model: Path, decode: WorkerShell, to_decode: WorkerClient, fault: signal.Signals
) -> None:
    loop = asyncio.get_running_loop()
    async with worker_process("prefill", model) as prefill:
        unpacks = Unpacks(decode)
        unpacks.hold_from(2)
        key = await begin("a", prefill, decode, to_decode)
        await reserve(to_decode, "b", SHORT, prefill.worker_id)
        await asyncio.wait_for(unpacks.held.wait(), 20)
        lost_at = loop.time()
        os.kill(prefill.pid, fault)
        await lost(to_decode, key, ("b", 1))
        noticed_s = loop.time() - lost_at
        unpacks.drop()
        await to_decode.at_rest()
        print(f"{fault.name}: noticed after {noticed_s:.2f} s, at rest after {loop.time() - lost_at:.2f} s")
        assert noticed_s < 15.0
        assert loop.time() - lost_at < 30.0
    assert key not in to_decode.tokens
    assert len(await to_decode.finished(await to_decode.generate("local", SHORT))) == 8


async def test_a_restarted_prefill_worker_takes_over(model: Path, decode: WorkerShell, to_decode: WorkerClient) -> None:
    async with worker_process("prefill", model) as first:
        unpacks = Unpacks(decode)
        unpacks.hold_from(2)
        key = await begin("a", first, decode, to_decode)
        await asyncio.wait_for(unpacks.held.wait(), 20)
        os.kill(first.pid, signal.SIGKILL)
        await lost(to_decode, key)
        unpacks.drop()
    async with worker_process("prefill", model) as second:
        again = await begin("again", second, decode, to_decode)
        rest = await to_decode.finished(again)
        await second.client.until(lambda: again in second.client.tokens, "the first token")
        local = await to_decode.finished(await to_decode.generate("reference", LONG))
        assert second.client.in_order(again) + rest == local
        await to_decode.at_rest()
        await second.client.at_rest()


async def test_a_prefill_worker_that_comes_back_says_nothing_wrong(
    model: Path, decode: WorkerShell, to_decode: WorkerClient
) -> None:
    """Stopped beyond every deadline and resumed: nothing of it is admitted, and it frees all by itself."""
    async with worker_process("prefill", model) as prefill:
        unpacks = Unpacks(decode)
        unpacks.hold_from(2)
        key = await begin("a", prefill, decode, to_decode)
        await asyncio.wait_for(unpacks.held.wait(), 20)
        os.kill(prefill.pid, signal.SIGSTOP)
        await lost(to_decode, key)
        unpacks.drop()
        await to_decode.at_rest()
        os.kill(prefill.pid, signal.SIGCONT)
        async with WorkerClient(prefill.address, "another router") as other:
            await other.at_rest()
            await connect(other, decode.worker_id, decode.transfer_address)
        assert key not in to_decode.tokens
        await to_decode.at_rest()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=lambda fault: fault.name)
async def test_prefill_frees_what_it_held_for_a_lost_decode_worker(model: Path, fault: signal.Signals) -> None:
    loop = asyncio.get_running_loop()
    async with (
        worker(config(model), "prefill") as prefill,
        WorkerClient(prefill.address) as to_prefill,
        worker_process("decode", model) as decode,
    ):
        await connect(to_prefill, decode.worker_id, decode.transfer_address)
        reserved = await reserve(decode.client, "a", LONG, prefill.worker_id)
        os.kill(decode.pid, signal.SIGSTOP)
        key = await to_prefill.prefill("a", LONG, decode.worker_id, reserved)
        await to_prefill.until(lambda: key in to_prefill.tokens, "the first token")
        lost_at = loop.time()
        os.kill(decode.pid, fault)
        await lost(to_prefill, key)
        await to_prefill.at_rest()
        print(f"{fault.name}: at rest after {loop.time() - lost_at:.2f} s")
        assert loop.time() - lost_at < 30.0
        assert len(await to_prefill.finished(await to_prefill.generate("local", SHORT))) == 8
