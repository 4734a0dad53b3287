"""How long hostile and large requests stop the router's event loop.

    python -m benchmarks.loop_latency [--out FILE] [CASE ...]

Serves the demo model's tokenizer and chat template over a worker, in another process, that answers at once, and lets
a client process send one case after the other. Meanwhile a task of the router's loop wakes every millisecond. Reported
are the longest time that it had to wait beyond that, and the most processor time of the loop's thread in one such wait.
The first is what other clients would notice, and includes whatever else the machine does; `idle` shows how much.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from baton.common.config import BatonConfig
from baton.demo_model import demo_model_path
from benchmarks.serve.environment import describe_client
from router.registry import Member
from router.server import Router
from tests.support.fake_worker import FakeWorker, answer

_TICK_S = 0.001
_SETTLE_S = 0.3
_CLIENT_S = 60.0


def http(path: str, body: bytes) -> bytes:
    return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(body), body)


def completion(prompt: bytes, more: bytes = b"") -> bytes:
    return http("/v1/completions", b'{"model":"demo_model","max_tokens":1,%s"prompt":%s}' % (more, prompt))


def ids(count: int) -> bytes:
    return b"[" + b"101," * (count - 1) + b"7]"


def texts(count: int, words: int) -> bytes:
    return json.dumps(["the meaning of a word " * (words // 5)] * count).encode()


def chat(content: bytes, messages: int = 1) -> bytes:
    one = b'{"role":"user","content":"%s"}' % content
    body = b'{"model":"demo_model","max_tokens":1,"messages":[%s]}' % b",".join([one] * messages)
    return http("/v1/chat/completions", body)


CASES: dict[str, Callable[[], bytes]] = {
    "idle": lambda: b"",
    "one short prompt": lambda: completion(b'"hello"'),
    "prompt of 2000 ids": lambda: completion(ids(2000)),
    "prompt of 32 KiB": lambda: completion(ids(8000)),
    "1M ids in one prompt": lambda: completion(ids(1_000_000)),
    "128 prompts of 8000 ids": lambda: completion(b"[" + b",".join([ids(8000)] * 128) + b"]"),
    "128 prompts of 100 words": lambda: completion(texts(128, 100)),
    "n 128": lambda: completion(b'"hello"', b'"n":128,'),
    "text of 4 MB": lambda: completion(b'"' + b"lorem ipsum " * 340_000 + b'"'),
    "text of 2M escapes": lambda: completion(b'"' + b'\\"' * 2_000_000 + b'"'),
    "tokenize 4 MB": lambda: http("/tokenize", b'{"prompt":"' + b"lorem ipsum " * 340_000 + b'"}'),
    "detokenize 131072": lambda: http("/detokenize", b'{"tokens":' + ids(131_072) + b"}"),
    "detokenize 1M": lambda: http("/detokenize", b'{"tokens":' + ids(1_000_000) + b"}"),
    "chat of 4000 messages": lambda: chat(b"a few words", 4000),
    "chat of 4 MB": lambda: chat(b"lorem ipsum " * 340_000),
    "1M empty objects": lambda: http("/v1/completions", b'{"x":[' + b"{}," * 1_000_000 + b"{}]}"),
    "objects in 32 KiB": lambda: http("/v1/completions", b'{"x":[' + b"{}," * 10_900 + b"{}]}"),
    "4M deep": lambda: completion(b"[" * 4_000_000),
    "100k deep": lambda: completion(b"[" * 100_000),
    "1e999 and NaN": lambda: completion(b'"a"', b'"temperature":1e999,"top_p":NaN,'),
    "chunks of one byte": lambda: (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        + b"1\r\na\r\n" * 100_000
        + b"0\r\n\r\n"
    ),
    "3000 headers": lambda: b"GET /ready HTTP/1.1\r\nhost: x\r\n" + b"a:b\r\n" * 3000 + b"\r\n",
    "1M headers": lambda: b"GET /ready HTTP/1.1\r\nhost: x\r\n" + b"a:b\r\n" * 1_000_000 + b"\r\n",
    "header of 64 MiB": lambda: b"GET /ready HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 2**26,
    "body of 64 MiB": lambda: http("/v1/completions", b" " * 2**26),
    "5000 requests in one go": lambda: b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n" * 5000,
}


@dataclass(slots=True)
class Watch:
    """Longest waits of a task that only wants to wake, in seconds."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    _task: asyncio.Task[None] | None = field(default=None, repr=False)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(_TICK_S)
            self.wall_s = max(self.wall_s, time.perf_counter() - wall - _TICK_S)
            self.cpu_s = max(self.cpu_s, time.thread_time() - cpu)


async def measure(name: str, port: int, watch: Watch) -> dict[str, object]:
    """One case, sent by a process of its own."""
    await asyncio.sleep(_SETTLE_S)
    command = [sys.executable, "-m", "benchmarks.loop_latency", "send", str(port), name]
    client = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert client.stdout is not None
    await client.stdout.readline()
    watch.wall_s = watch.cpu_s = 0.0
    output, _ = await client.communicate(b"go\n")
    await asyncio.sleep(_SETTLE_S)
    wall_ms, cpu_ms = round(watch.wall_s * 1e3, 1), round(watch.cpu_s * 1e3, 1)
    return {"answer": output.decode().strip(), "longest_wait_ms": wall_ms, "longest_cpu_ms": cpu_ms}


def send(port: int, name: str) -> None:
    """Have the request ready, wait for the word, send it; prints the first line of the answer."""
    request = CASES[name]()
    print("ready", flush=True)
    sys.stdin.readline()
    if not request:
        time.sleep(1.0)
        return
    with socket.create_connection(("127.0.0.1", port), timeout=_CLIENT_S) as connection:
        try:
            connection.sendall(request)
            print(connection.recv(4096).partition(b"\r\n")[0].decode())
        except (ConnectionError, TimeoutError) as error:
            print(type(error).__name__)


async def serve_worker() -> None:
    """A decode worker that answers every command at once; prints its address."""
    worker = FakeWorker("decode", "decode", answer, max_model_len=131_072, num_blocks=100_000)
    await worker.start()
    print(worker.address, flush=True)
    await asyncio.Event().wait()


async def run(names: list[str]) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.loop_latency", "worker"]
    worker = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert worker.stdout is not None
    server = {"port": 0, "grpc_port": 0}
    router = Router(BatonConfig.model_validate({"model": str(demo_model_path()), "server": server}))
    await router.start()
    router.registry.set_members([Member((await worker.stdout.readline()).decode().strip(), "decode")])
    await asyncio.wait_for(router.registry.wait_for(0, 1), 20)
    gc.collect()
    gc.freeze()  # as `baton serve` does
    watch = Watch()
    watch.start()
    results: dict[str, object] = {}
    try:
        for name in names:
            results[name] = measured = await measure(name, router.http_port, watch)
            print(f"{name:28} {measured}", flush=True)
    finally:
        await router.stop()
        worker.kill()
        await worker.wait()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", choices=[[], *CASES])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.cases or list(CASES)
    results = {"environment": asyncio.run(describe_client()), "cases": asyncio.run(run(names))}
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["send"]:
        send(int(sys.argv[2]), sys.argv[3])
    elif sys.argv[1:2] == ["worker"]:
        asyncio.run(serve_worker())
    else:
        main()
