"""The prefill worker as a Ray actor. Ray starts, finds and restarts it; requests reach it by gRPC only."""

from __future__ import annotations

import ray.util

from baton.worker.actor_base import WorkerActor
from prefill_worker.handover import PrefillHalf


class PrefillWorker(WorkerActor):
    """`baton.cluster` makes it a remote class and places it."""

    def __init__(self) -> None:
        super().__init__("prefill", [PrefillHalf])

    async def start(self, config_json: str) -> dict[str, str]:
        """See `WorkerActor.start_on`; the default address is the one under which Ray knows this node."""
        return await self.start_on(config_json, str(ray.util.get_node_ip_address()))  # type: ignore[no-untyped-call]
