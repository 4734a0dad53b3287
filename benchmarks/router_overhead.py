"""What the router adds to a request: workers that answer at once, a client at concurrency 1, a process for each.

    python -m benchmarks.router_overhead [--requests 1000] [--out FILE]

Prints percentiles of the time from request to answer for a completion of one token, on the local and the remote path,
and beside them those of `GET /ready`, which is the cost of HTTP alone. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import numpy as np

from baton.common.config import BatonConfig
from baton.engine.models.tiny import write_tiny_llama
from benchmarks.serve.environment import describe_client
from router.registry import Member
from router.server import Router
from tests.support.fake_worker import pair_of_answers

_WARM_UP = 200


async def serve_workers() -> None:
    """A prefill and a decode worker that answer every command at once; prints their addresses."""
    prefill, decode = pair_of_answers("prefill", "decode")
    await prefill.start()
    await decode.start()
    print(prefill.address, decode.address, flush=True)
    await asyncio.Event().wait()


async def serve_router(policy: str, prefill: str, decode: str) -> None:
    """A router over the two; prints its port."""
    with tempfile.TemporaryDirectory() as directory:
        model = str(write_tiny_llama(Path(directory) / "tiny"))
        server = {"port": 0, "grpc_port": 0}
        config = BatonConfig.model_validate({"model": model, "server": server, "router": {"policy": policy}})
        router = Router(config)
    await router.start()
    router.registry.set_members([Member(prefill, "prefill"), Member(decode, "decode")])
    await asyncio.wait_for(router.registry.wait_for(1, 1), 20)
    print(router.http_port, flush=True)
    await asyncio.Event().wait()


def start(*arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
    """This module in another process; also returns the words that it prints first."""
    command = [sys.executable, "-m", "benchmarks.router_overhead", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output: IO[str] | None = process.stdout
    assert output is not None
    return process, output.readline().split()


def measure(port: int, requests: int) -> dict[str, dict[str, float]]:
    """Milliseconds by what was asked, over one connection that stays open."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 1})
    asked = {"completion": ("POST", "/v1/completions", body), "ready": ("GET", "/ready", None)}
    return {
        name: percentiles([ask(connection, *what) for _ in range(_WARM_UP + requests)]) for name, what in asked.items()
    }


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: str | None) -> float:
    began = time.perf_counter()
    connection.request(method, path, body)
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{method} {path}: {response.status} {content!r}")
    return (time.perf_counter() - began) * 1e3


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    values = np.percentile(milliseconds[_WARM_UP:], [50, 90, 99])
    return {name: round(float(value), 3) for name, value in zip(("p50", "p90", "p99"), values, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, object] = {"environment": asyncio.run(describe_client()), "requests": options.requests}
    workers, addresses = start("workers")
    try:
        for policy in ("local", "remote"):
            router, (port,) = start("router", policy, *addresses)
            try:
                results[policy] = measure(int(port), options.requests)
            finally:
                router.kill()
                router.wait()
            print(f"{policy:7} {results[policy]}")
    finally:
        workers.kill()
        workers.wait()
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["workers"]:
        asyncio.run(serve_workers())
    elif sys.argv[1:2] == ["router"]:
        asyncio.run(serve_router(*sys.argv[2:5]))
    else:
        main()
