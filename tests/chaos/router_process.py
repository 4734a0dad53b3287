"""A router in a process of its own, for the test that kills it.

`python -m tests.chaos.router_process MODEL ROLE=ADDRESS...`
The child prints its URL once all workers are attached and connected, and serves until it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from baton.common.config import BatonConfig, RouterConfig, ServerConfig
from router.registry import Member
from router.server import Router


async def main(model: Path, members: list[Member]) -> None:
    settings = RouterConfig(policy="remote", heartbeat_interval_s=0.05, heartbeat_timeout_s=2.0)
    config = BatonConfig(model=str(model), server=ServerConfig(port=0, grpc_port=0), router=settings)
    router = Router(config)
    await router.start()
    router.registry.set_members(members)
    roles = [member.role for member in members]
    await router.registry.wait_for(roles.count("prefill"), roles.count("decode"))
    print(f"http://127.0.0.1:{router.http_port}", flush=True)
    await asyncio.Event().wait()


def _member(argument: str) -> Member:
    role, _, address = argument.partition("=")
    return Member(address, role)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), [_member(argument) for argument in sys.argv[2:]]))
