"""A prefill worker in a process of its own, for tests that kill or stop it: `python -m tests.transfer.prefill_process`.

Takes the model directory as its argument, prints one line "worker_id address", and serves until it is killed or its
standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch

from tests.transfer.handover_cluster import config, worker


async def main(model: Path) -> None:
    torch.set_num_threads(1)
    async with worker(config(model), "prefill") as shell:
        print(shell.worker_id, shell.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
