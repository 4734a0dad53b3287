"""A worker process as an actor: the methods that its supervisor calls. Knows no Ray; each role's actor adds that."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence

from baton.common.config import BatonConfig, FaultSettings
from baton.engine.build import build_engine
from baton.worker.half import HalfFactory
from baton.worker.interpreter import freeze_heap, shorten_turns
from baton.worker.shell import WorkerShell

logger = logging.getLogger(__name__)

EXIT_CODE = 70


class WorkerActor:
    """Owns one shell. All methods run on the actor's asyncio loop; several may run at a time."""

    def __init__(self, role: str, halves: Sequence[HalfFactory]) -> None:
        self._role = role
        self._halves = halves
        self._starting = asyncio.Lock()
        self._shell: WorkerShell | None = None
        self._stopped = asyncio.Event()

    async def start_on(self, config_json: str, default_host: str) -> dict[str, str]:
        """Load the model and serve; returns worker_id and address. Again: the same answer. Raises ConfigError.

        Listens on `cluster.worker_host`, or on `default_host` where that is not set.
        """
        async with self._starting:
            if self._shell is None:
                shorten_turns()
                logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
                config = BatonConfig.model_validate_json(config_json)
                host = config.cluster.worker_host or default_host
                shell = WorkerShell(config, self._role, host, build_engine, self._halves, on_lost=end_process)
                await shell.start()
                freeze_heap()
                self._shell = shell
        return {"worker_id": self._shell.worker_id, "address": self._shell.address}

    async def health(self) -> dict[str, object]:
        """See `WorkerShell.health`; not healthy before `start` has returned."""
        if self._shell is None:
            return {"healthy": False, "reason": "not started", "role": self._role}
        return self._shell.health()

    async def inject(self, settings_json: str) -> None:
        """See `WorkerShell.inject`; a worker that has not started has nothing to disturb."""
        if self._shell is not None:
            self._shell.inject(FaultSettings.model_validate_json(settings_json))

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new work, wait for the running; whether all of it ended in time."""
        return self._shell is None or await self._shell.drain(timeout_s)

    async def stop(self) -> None:
        """End everything. Idempotent."""
        if self._shell is not None:
            await self._shell.stop()
        self._stopped.set()

    async def wait_closed(self) -> None:
        """Returns after `stop`; a caller learns of this process's death by the call's failure."""
        await self._stopped.wait()


def end_process(reason: str) -> None:
    """At once, as by a crash: the broken streams tell routers and peers, and the supervisor starts a new process."""
    logger.critical("the process ends: %s", reason)
    os._exit(EXIT_CODE)
