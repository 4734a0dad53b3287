"""Checks of GPUs and the links between them. Everything that touches CUDA runs in a process of its own with a deadline:
a broken driver hangs whoever asks it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from baton.doctor.finding import Finding, note, ok, skipped, wrong

TIMEOUT_S = 60.0
MIN_CAPABILITY = (8, 0)
FREE_SHARE = 0.9
_ASK_TORCH = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
gpus = []
for index in range(count):
    about = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    ones = torch.ones(1024, device=torch.device("cuda", index))
    gpus.append({"name": about.name, "capability": [about.major, about.minor], "free": free, "total": total,
                 "sum": float(ones.sum())})
peers = [[a, b] for a in range(count) for b in range(count) if a != b and torch.cuda.can_device_access_peer(a, b)]
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus, "peers": peers}))
"""
Run = Callable[[Sequence[str], float], str]


class ToolFailed(Exception):
    """A program is missing, failed or did not end in time; the text says which."""


def run(command: Sequence[str], timeout_s: float) -> str:
    """Standard output of a program. Raises ToolFailed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except OSError as error:
        raise ToolFailed(f"{command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise ToolFailed(f"{command[0]} did not end within {timeout_s:g} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ToolFailed(f"{command[0]} ended with {done.returncode}: {lines[-1] if lines else 'no output'}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Gpus:
    """What torch sees. `peers`: pairs (a, b) of which a can reach b's memory directly."""

    count: int
    peers: frozenset[tuple[int, int]]


def gpus(run: Run = run, variables: Mapping[str, str] = os.environ) -> tuple[list[Finding], Gpus]:
    """The driver's list beside torch's."""
    found, driver_count = _driver(run)
    try:
        said = json.loads(run([sys.executable, "-c", _ASK_TORCH], TIMEOUT_S).splitlines()[-1])
    except ToolFailed as error:
        change = "look at dmesg for Xid errors; reset the GPU or restart the machine"
        return [*found, wrong("GPUs", f"torch cannot use them: {error}", change)], Gpus(0, frozenset())
    known = Gpus(len(said["gpus"]), frozenset((a, b) for a, b in said["peers"]))
    if not known.count and variables.get("CUDA_VISIBLE_DEVICES") == "":
        return [
            *found,
            skipped("GPUs", "hidden by CUDA_VISIBLE_DEVICES; workers will run on the CPU, over gloo"),
        ], known
    if not known.count:
        return [*found, _no_gpu(said["cuda"], said["torch"], driver_count)], known
    found += [_gpu(index, gpu) for index, gpu in enumerate(said["gpus"])]
    return found, known


def _driver(run: Run) -> tuple[list[Finding], int]:
    query = ["nvidia-smi", "--query-gpu=driver_version,mig.mode.current", "--format=csv,noheader"]
    try:
        lines = run(query, TIMEOUT_S).strip().splitlines()
    except ToolFailed as error:
        return [skipped("driver", f"no NVIDIA driver: {error}")], 0
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    found = [ok("driver", f"{rows[0][0]}, {len(rows)} GPUs")] if rows else [skipped("driver", "it lists no GPU")]
    partitioned = [str(index) for index, row in enumerate(rows) if row[-1] == "Enabled"]
    if partitioned:
        text = f"GPUs {', '.join(partitioned)} are partitioned (MIG), and partitions have no links to each other"
        found.append(wrong("driver", text, "use whole GPUs for prefill and decode workers"))
    return found, len(rows)


def _no_gpu(cuda: str | None, torch: str, driver_count: int) -> Finding:
    if not driver_count:
        return skipped("GPUs", f"none (torch {torch}); workers will run on the CPU, over gloo")
    if cuda is None:
        return wrong("GPUs", f"torch {torch} is a CPU build", "install a CUDA build of torch")
    change = f"update the driver to one for CUDA {cuda}, or unset CUDA_VISIBLE_DEVICES"
    return wrong("GPUs", f"the driver has {driver_count}, torch {torch} sees none", change)


def _gpu(index: int, about: dict[str, object]) -> Finding:
    capability, free, total = about["capability"], about["free"], about["total"]
    assert isinstance(capability, list)
    assert isinstance(free, int)
    assert isinstance(total, int)
    check, gib = f"GPU {index}", 2**30
    text = f"{about['name']}, {free / gib:.0f} of {total / gib:.0f} GiB free"
    if about["sum"] != 1024.0:
        return wrong(check, f"{text}: computes wrongly ({about['sum']} for 1024)", "take it out of service")
    if tuple(capability) < MIN_CAPABILITY:
        change = "use a GPU of compute capability 8.0 or later"
        return wrong(check, f"{text}: compute capability {capability[0]}.{capability[1]} has no bfloat16", change)
    if free < FREE_SHARE * total:
        change = "end what else runs there (nvidia-smi), or lower engine.gpu_memory_utilization"
        return wrong(check, f"{text}: another program uses it", change)
    return ok(check, text)


def links(known: Gpus, run: Run = run) -> list[Finding]:
    """How any two GPUs reach each other: NVLink, PCIe, or through host memory."""
    if known.count < 2:
        return [skipped("links", "fewer than two GPUs")]
    try:
        kinds = topology(run(["nvidia-smi", "topo", "-m"], TIMEOUT_S))
    except ToolFailed as error:
        kinds = {}
        found = [note("links", f"their kind is not known: {error}")]
    else:
        found = []
    missing = [pair for pair in combinations(range(known.count), 2) if not {pair, pair[::-1]} <= known.peers]
    if missing:
        change = "disable PCIe ACS / IOMMU, expose all GPUs of a link to the container, do not set NCCL_P2P_DISABLE"
        text = f"no direct access between GPUs {', '.join(f'{a}-{b}' for a, b in missing)}: KV goes through host memory"
        found.append(wrong("links", text, change))
    slow = [pair for pair in combinations(range(known.count), 2) if not kinds.get(pair, "NV").startswith("NV")]
    if slow and not missing:
        text = f"GPUs {', '.join(f'{a}-{b} ({kinds[a, b]})' for a, b in slow)} are linked over PCIe"
        found.append(note("links", text, "put prefill and decode workers on GPUs joined by NVLink"))
    if not missing and not slow:
        found.append(ok("links", f"{', '.join(sorted(set(kinds.values()))) or 'direct access'} between all GPUs"))
    return found


def topology(text: str) -> dict[tuple[int, int], str]:
    """Kind of link by pair of GPUs, from `nvidia-smi topo -m`: NV18, PIX, PXB, PHB, NODE or SYS."""
    # Headers are underlined on a terminal, and with some drivers in a pipe too. Columns after the GPUs' are of others.
    lines = re.findall(r"^GPU(\d+)\s+(.*)$", re.sub(r"\x1b\[[0-9;]*m", "", text), re.MULTILINE)
    rows = {int(index): cells.split() for index, cells in lines if " X " in f" {cells.strip()} "}
    return {
        (index, other): kind
        for index, cells in rows.items()
        for other, kind in enumerate(cells[: len(rows)])
        if other > index
    }
