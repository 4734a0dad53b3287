"""Brings up KV connections as workers do, each between two processes, with a deadline of our own: a pair that hangs is
a finding, not a doctor that hangs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import combinations

from baton.doctor.finding import Finding, note, ok, wrong
from baton.doctor.gpus import Gpus
from kv_transfer.connection import nccl_environment
from kv_transfer.rendezvous import StoreServer

PAIR_TIMEOUT_S = 30.0
MAX_ALL_PAIRS = 4
SLOW_SHARE = 0.5
_END = "baton.doctor.pair_end"


def pairs_to_try(count: int) -> list[tuple[int, int]]:
    """All pairs of a few GPUs; of many, each with the next, so that every GPU is in two."""
    if count <= MAX_ALL_PAIRS:
        return list(combinations(range(count), 2))
    return [(index, (index + 1) % count) for index in range(count)]


def connections(
    known: Gpus, host: str, visible: Sequence[str] = (), timeout_s: float = PAIR_TIMEOUT_S, module: str = _END
) -> list[Finding]:
    """NCCL between GPUs; without two of them gloo between two CPU processes."""
    if known.count < 2:
        return [_pair("gloo pair", host, (None, None), timeout_s, module)[0]]
    found, rates = [], {}
    for pair in pairs_to_try(known.count):
        names = tuple(visible[index] if visible else str(index) for index in pair)
        finding, rate = _pair(f"NCCL pair {pair[0]}-{pair[1]}", host, (names[0], names[1]), timeout_s, module)
        found.append(finding)
        if rate:
            rates[pair] = rate
    best = max(rates.values(), default=0.0)
    for pair, rate in rates.items():
        if rate < SLOW_SHARE * best:
            text = f"{rate:.0f} GB/s, the best pair has {best:.0f}"
            found.append(note(f"NCCL pair {pair[0]}-{pair[1]}", text, "place pairs on GPUs with a better link"))
    return found


def _pair(
    check: str, host: str, gpus: tuple[str | None, str | None], timeout_s: float, module: str
) -> tuple[Finding, float]:
    """The finding and GB/s."""
    server = StoreServer(host)
    ends = [_start(rank, host, server.port, gpu, timeout_s, module) for rank, gpu in enumerate(gpus)]
    deadline = time.monotonic() + timeout_s
    answers = []
    try:
        for end in ends:
            out, err = end.communicate(timeout=max(0.1, deadline - time.monotonic()))
            answers.append((end.returncode, out, err))
    except subprocess.TimeoutExpired:
        change = "run again with NCCL_DEBUG=INFO; look at links, /dev/shm and dmesg"
        return wrong(check, f"did not connect and move data within {timeout_s:g} s", change), 0.0
    finally:
        for end in ends:
            end.kill()
            end.communicate()
        server.close()
    failed = [err.strip().splitlines()[-1] if err.strip() else f"ended with {code}" for code, _, err in answers if code]
    if failed:
        change = "run again with NCCL_DEBUG=INFO" if gpus[0] is not None else "check the address and the firewall"
        return wrong(check, failed[0], change), 0.0
    said = [json.loads(out.splitlines()[-1]) for _, out, _ in answers]
    rate = min(float(one["gb_s"]) for one in said)
    memory = max(int(one["memory"]) for one in said)
    taken = f", {memory / 2**20:.0f} MiB of each GPU" if memory else ""
    seconds = max(float(one["connect_s"]) for one in said)
    return ok(check, f"connected in {seconds:.2f} s, {rate:.1f} GB/s{taken}, data intact"), rate


def _start(rank: int, host: str, port: int, gpu: str | None, timeout_s: float, module: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, str(rank), host, str(port), "cuda" if gpu else "cpu", str(timeout_s)]
    environment = {**os.environ, **nccl_environment(), "CUDA_VISIBLE_DEVICES": gpu or ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
