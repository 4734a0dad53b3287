"""A worker in a process of its own, for tests that kill or stop it.

`python -m tests.transfer.worker_process ROLE MODEL`
The child prints one line "worker_id address" and serves until it is killed or its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.worker_client import WorkerClient
from tests.transfer.handover_cluster import config, worker

START_S = 60.0


@dataclass
class RemoteWorker:
    """A worker in a child process, and the router's stream to it."""

    pid: int
    worker_id: str
    address: str
    transfer_address: str
    client: WorkerClient


@asynccontextmanager
async def worker_process(role: str, model: Path) -> AsyncIterator[RemoteWorker]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.transfer.worker_process",
        role,
        str(model),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        worker_id, address = line.decode().split()
        async with WorkerClient(address) as client:
            hello = await client.attached()
            yield RemoteWorker(process.pid, worker_id, address, hello.transfer_address, client)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def main(role: str, model: Path) -> None:
    torch.set_num_threads(1)
    async with worker(config(model), role) as shell:
        print(shell.worker_id, shell.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
