"""Where a result comes from: the client's machine, the server's own words about itself, date and commit."""

from __future__ import annotations

import asyncio
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from baton.common.errors import Unavailable
from benchmarks.serve.connection import Server

_TOOL_TIMEOUT_S = 10.0


async def describe_client() -> dict[str, Any]:
    """Hardware and software of this side. GPUs are listed because the server often runs on the same machine."""
    commit = await _output("git", "rev-parse", "HEAD")
    changes = await _output("git", "status", "--porcelain", "--untracked-files=no")
    gpus = await _output("nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader")
    return {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_dirty": None if commit is None else bool(changes),
        "cpu": cpu_model(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus.splitlines() if gpus else [],
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


async def describe_server(server: Server, api_key: str | None) -> dict[str, Any]:
    """Its address, `/v1/models` and, where there is one, `/version`. Raises Unavailable when it does not answer."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(headers=headers, timeout=30.0) as http:
        try:
            models = await http.get(f"{server.url}/v1/models")
            version = await http.get(f"{server.url}/version")
        except httpx.HTTPError as error:
            raise Unavailable(f"{server.url} does not answer: {type(error).__name__}: {error}") from error
    return {
        "url": server.url,
        "software": models.headers.get("server"),
        "version": _json(version),
        "models": _json(models),
    }


def served_models(description: dict[str, Any]) -> list[str]:
    """Ids in the `/v1/models` answer; empty where there is none."""
    models = description["models"]
    entries = models.get("data", []) if isinstance(models, dict) else []
    return [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


async def _output(*command: str) -> str | None:
    """Standard output of a tool; None where it is missing, fails or hangs."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return None
    try:
        out, _ = await asyncio.wait_for(process.communicate(), _TOOL_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return None
    return out.decode("utf-8", "replace").strip() if process.returncode == 0 else None


def _json(response: httpx.Response) -> object:
    if response.status_code != 200:
        return None
    try:
        return response.json()
    except ValueError:
        return response.text[:200]
