"""The bench's worker processes, seen from the bench: started, asked, ended."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from kv_transfer.connection import nccl_environment

_MAX_ANSWER_BYTES = 1 << 27
_EXIT_S = 20.0


class ProbeFailed(Exception):
    """A worker process of the bench died, hung or could not do what it was asked."""


class Child:
    """One `benchmarks.transfer.probe`. `gpu`: the one that it sees, None for none."""

    def __init__(self, name: str, role: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.role = role
        self._process = process
        self._asking = asyncio.Lock()

    @classmethod
    async def start(cls, name: str, role: str, gpu: str | None) -> Child:
        environment = {**os.environ, **nccl_environment()} if gpu is not None else dict(os.environ)
        environment["CUDA_VISIBLE_DEVICES"] = gpu if gpu is not None else ""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "benchmarks.transfer.probe",
            role,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            limit=_MAX_ANSWER_BYTES,
        )
        return cls(name, role, process)

    async def ask(self, call: str, timeout_s: float = 60.0, **arguments: Any) -> Any:
        """The answer. Raises ProbeFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._asking:
            self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}).encode() + b"\n")
            try:
                line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
            except TimeoutError:
                raise ProbeFailed(f"{self.name}: no answer to {call} within {timeout_s:g} s") from None
        if not line:
            raise ProbeFailed(f"{self.name} ended with {await self._process.wait()} at {call}")
        answer = json.loads(line)
        if "error" in answer:
            raise ProbeFailed(f"{self.name}: {call}: {answer['error']}")
        return answer["result"]

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def end(self) -> None:
        """Kill it, unless it is dead, and wait."""
        self.kill()
        await asyncio.wait_for(self._process.wait(), _EXIT_S)


def gpus() -> list[str]:
    """The GPUs that may be used, as names for CUDA_VISIBLE_DEVICES, without touching any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    nodes = [name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()]
    return [str(index) for index in range(len(nodes))]
