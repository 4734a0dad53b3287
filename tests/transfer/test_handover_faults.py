"""A prefill worker that dies or stands still amid a transfer, as decode and router see it. It has its own process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from baton.worker.shell import WorkerShell
from protos import worker_pb2 as pb
from tests.support.tiny_model import make_tiny_llama
from tests.support.worker_client import WorkerClient
from tests.transfer.handover_cluster import Unpacks, config, prompt, spec, worker

START_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


@dataclass
class RemotePrefill:
    """A prefill worker in a child process, and the router's stream to it."""

    pid: int
    worker_id: str
    client: WorkerClient

    async def connect(self, decode: WorkerShell) -> None:
        await self.client.send(connect_peer=pb.ConnectPeer(worker_id=decode.worker_id, address=decode.address))
        history = self.client.peer_history
        await self.client.until(lambda: (decode.worker_id, "connected") in history, "the connection")

    async def begin(self, request_id: str, request: pb.RequestSpec, decode: WorkerShell, client: WorkerClient) -> None:
        key = await client.open(request_id, request, self.worker_id)
        await client.until(lambda: key in client.reserved, "the reservation")
        await self.client.prefill(request_id, request, decode.worker_id, client.reserved[key])


@asynccontextmanager
async def prefill_process(model: Path) -> AsyncIterator[RemotePrefill]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.transfer.prefill_process",
        str(model),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        worker_id, address = line.decode().split()
        async with WorkerClient(address) as client:
            await client.attached()
            yield RemotePrefill(process.pid, worker_id, client)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_decode_frees_what_a_lost_prefill_worker_held(model: Path, fault: signal.Signals) -> None:
    async with AsyncExitStack() as stack:
        decode = await stack.enter_async_context(worker(config(model), "decode"))
        to_decode = await stack.enter_async_context(WorkerClient(decode.address))
        first = await stack.enter_async_context(prefill_process(model))
        await first.connect(decode)
        unpacks = Unpacks(decode)
        unpacks.hold_from(2)
        await first.begin("a", spec(prompt(200)), decode, to_decode)
        await to_decode.open("b", spec(prompt(50, seed=1)), first.worker_id)
        await asyncio.wait_for(unpacks.held.wait(), 20)
        os.kill(first.pid, fault)
        loop = asyncio.get_running_loop()
        lost_at = loop.time()
        await to_decode.until(lambda: len(to_decode.failed) == 2, "word of the loss")
        assert {failed.code for failed in to_decode.failed.values()} == {"peer_lost"}
        print(f"{fault.name}: decode noticed after {loop.time() - lost_at:.2f} s")
        unpacks.drop()
        await to_decode.at_rest()
        print(f"{fault.name}: decode was at rest after {loop.time() - lost_at:.2f} s")
        assert loop.time() - lost_at < 10.0
        assert ("a", 1) not in to_decode.tokens
        assert len(await to_decode.finished(await to_decode.generate("local", spec(prompt(20))))) == 8
        if fault is signal.SIGKILL:
            await another_prefill_worker_serves(model, decode, to_decode)


async def another_prefill_worker_serves(model: Path, decode: WorkerShell, to_decode: WorkerClient) -> None:
    async with prefill_process(model) as second:
        await second.connect(decode)
        await second.begin("again", spec(prompt(200)), decode, to_decode)
        rest = await to_decode.finished(("again", 1))
        await second.client.until(lambda: ("again", 1) in second.client.tokens, "the first token")
        [first_token] = second.client.in_order(("again", 1))
        local = await to_decode.finished(await to_decode.generate("reference", spec(prompt(200))))
        assert [first_token, *rest] == local
        await to_decode.at_rest()


@pytest.mark.slow
async def test_a_prefill_worker_that_comes_back_says_nothing_wrong(model: Path) -> None:
    """Stopped beyond every deadline and resumed: its streams are gone, and nothing of it reaches a router."""
    async with AsyncExitStack() as stack:
        decode = await stack.enter_async_context(worker(config(model), "decode"))
        to_decode = await stack.enter_async_context(WorkerClient(decode.address))
        first = await stack.enter_async_context(prefill_process(model))
        await first.connect(decode)
        unpacks = Unpacks(decode)
        unpacks.hold_from(2)
        await first.begin("a", spec(prompt(200)), decode, to_decode)
        await asyncio.wait_for(unpacks.held.wait(), 20)
        os.kill(first.pid, signal.SIGSTOP)
        await to_decode.until(lambda: ("a", 1) in to_decode.failed, "word of the loss")
        unpacks.drop()
        await to_decode.at_rest()
        os.kill(first.pid, signal.SIGCONT)
        await first.client.until(
            lambda: (
                first.client.peer_history.count((decode.worker_id, "connected")) == 2 or first.client.ended is not None
            ),
            "the return",
        )
        async with WorkerClient(first.client._address, "router-2") as client:
            await client.at_rest()
        assert ("a", 1) not in to_decode.tokens
        await to_decode.at_rest()
