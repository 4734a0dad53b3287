"""Actors of the supervisor's tests. They import no torch, which would take most of the time in which they start."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.cluster.controller import ClusterController

EXIT_CODE = 70


@dataclass(frozen=True)
class Spell:
    """While it is cast, workers cannot be constructed. `hanging`: they do not come up. `on_controller`: nor it."""

    file: Path

    def cast(self) -> None:
        self.file.touch()

    def lift(self) -> None:
        self.file.unlink()

    def check(self) -> None:
        if self.file.exists():
            raise OSError("the disk is full")

    @property
    def hanging(self) -> Spell:
        return Spell(self.file.with_suffix(".hanging"))

    @property
    def on_controller(self) -> Spell:
        return Spell(self.file.with_suffix(".controller"))


def flaky_worker(spell: Spell) -> type:
    """A worker that serves nothing and only says where it is: see `WorkerActor` for its methods."""

    class FlakyWorker:
        def __init__(self) -> None:
            spell.check()
            self._stopped = asyncio.Event()

        async def start(self, config_json: str) -> dict[str, str]:
            if spell.hanging.file.exists():
                await asyncio.Event().wait()
            return {"worker_id": f"decode-{os.getpid()}", "address": "127.0.0.1:1"}

        async def health(self) -> dict[str, object]:
            return {"healthy": True, "role": "decode"}

        async def lose_engine(self) -> None:
            os._exit(EXIT_CODE)

        async def stop(self) -> None:
            self._stopped.set()

        async def wait_closed(self) -> None:
            await self._stopped.wait()

    return FlakyWorker


def flaky_controller(spell: Spell) -> type:
    class FlakyController(ClusterController):
        def __init__(self, *args: Any) -> None:
            spell.on_controller.check()
            super().__init__(*args)

        async def end(self) -> None:
            os._exit(EXIT_CODE)

    return FlakyController
