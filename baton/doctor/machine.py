"""Checks of the machine itself: versions, environment variables, limits, shared memory, clock."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from baton.doctor.finding import Finding, note, ok, skipped, wrong

MIB = 1 << 20
MIN_OPEN_FILES = 4096
MIN_SHM_BYTES, GOOD_SHM_BYTES = 256 * MIB, 1024 * MIB
MAX_SLEEP_OVERRUN_S = 0.02
_CLOCK_SOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
# Name, lowest version that works, first that is not known to.
_PACKAGES = (("torch", (2, 11), (2, 14)), ("ray", (2, 60), (2, 61)), ("triton", (3, 6), (3, 8)))
Version = tuple[int, ...]


def versions(
    version_of: Callable[[str], str] = importlib.metadata.version, python: Sequence[int] = sys.version_info[:3]
) -> list[Finding]:
    """Python and the packages whose versions matter to more than this process."""
    text = ".".join(map(str, python))
    found = [
        ok("python", f"{text} ({platform.machine()})")
        if (3, 11) <= tuple(python[:2]) <= (3, 12)
        else wrong("python", f"{text} is not supported", "use Python 3.11 or 3.12, the same on all nodes")
    ]
    return found + [_package(name, lowest, beyond, version_of) for name, lowest, beyond in _PACKAGES]


def _package(name: str, lowest: Version, beyond: Version, version_of: Callable[[str], str]) -> Finding:
    wanted = f"{'.'.join(map(str, lowest))} or later, before {'.'.join(map(str, beyond))}"
    try:
        version = version_of(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "triton":
            return skipped(name, "not installed; a CUDA build of torch brings it, a CPU needs none")
        return wrong(name, "is not installed", f"pip install '{name}' at {wanted}")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if lowest <= numbers < beyond:
        return ok(name, version)
    return wrong(name, f"{version} is not supported", f"install {name} {wanted}, the same on all nodes")


def environment(variables: Mapping[str, str] = os.environ) -> list[Finding]:
    """Variables that would make transfers slow, wrong or dangerous. Workers set those for NCCL themselves."""
    found = []
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "CUDA_LAUNCH_BLOCKING"):
        if variables.get(name, "0") not in ("", "0"):
            found.append(wrong(name, f"is {variables[name]}: KV transfers or every step will be slow", f"unset {name}"))
    for name in ("NCCL_NVLS_ENABLE",):
        if variables.get(name, "0") not in ("", "0"):
            change = f"unset {name}; workers run with 0 whatever it says, other programs on this machine do not"
            found.append(note(name, f"is {variables[name]}: NVLink multicast can put a host out of service", change))
    if variables.get("CUDA_VISIBLE_DEVICES") == "":
        found.append(note("CUDA_VISIBLE_DEVICES", "is empty: no GPU will be seen", "unset it to use GPUs"))
    if variables.get("RAY_ADDRESS"):
        text = f"is {variables['RAY_ADDRESS']}; `baton serve` without --ray-address starts a cluster of its own"
        found.append(note("RAY_ADDRESS", text, "give --ray-address to join that one"))
    return found or [ok("environment", "no variable that disturbs NCCL, CUDA or Ray")]


def open_files(limits: tuple[int, int] | None = None) -> list[Finding]:
    """One connection is one file, on the router and on every worker."""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_limit(soft)} open files per process (at most {_limit(hard)})"
    if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES:
        return [ok("open files", text)]
    return [wrong("open files", f"{text} are too few for many clients", "ulimit -n 65536, or LimitNOFILE= of the unit")]


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def shared_memory(path: Path = Path("/dev/shm"), sizes: tuple[int, int] | None = None) -> list[Finding]:
    """Ray's object store and NCCL's host buffers lie there. `sizes`: total and free bytes."""
    if sizes is None:
        try:
            stat = os.statvfs(path)
        except OSError as error:
            return [wrong("shared memory", f"{path}: {error.strerror}", f"mount a tmpfs on {path}")]
        sizes = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    total, free = sizes
    text = f"{free // MIB} of {total // MIB} MiB of {path} free"
    change = "give the container more (docker: --shm-size=8g; Kubernetes: an emptyDir with medium Memory on /dev/shm)"
    if free < MIN_SHM_BYTES:
        return [wrong("shared memory", f"{text}: too little for Ray and NCCL", change)]
    if free < GOOD_SHM_BYTES:
        return [note("shared memory", text, change)]
    return [ok("shared memory", text)]


def clock(sleep: Callable[[float], None] = time.sleep, source: Path = _CLOCK_SOURCE) -> list[Finding]:
    """Deadlines and heartbeats need a clock that is cheap to read, and threads that wake up when they should."""
    overruns = []
    for _ in range(10):
        started = time.monotonic()
        sleep(0.001)
        overruns.append(time.monotonic() - started - 0.001)
    late = statistics.median(overruns)
    found = [ok("clock", f"a sleep ends {late * 1e3:.2f} ms late")]
    if late > MAX_SLEEP_OVERRUN_S:
        change = "take load off this machine, or give the container more CPU"
        found = [wrong("clock", f"a sleep ends {late * 1e3:.0f} ms late: heartbeats will be missed", change)]
    try:
        name = source.read_text(encoding="ascii").strip()
    except OSError:
        return found
    if name in ("hpet", "acpi_pm", "jiffies"):
        found.append(note("clock source", f"{name} is slow to read", "boot with clocksource=tsc where the CPU allows"))
    return found
