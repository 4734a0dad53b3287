"""Finding processes of this machine by their port, their title or what they inherited. Linux only."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_LISTEN = "0A"


def listener_pid(host: str, port: int) -> int | None:
    """The process that listens there, if that is an address of this machine and the process belongs to this user."""
    if not _is_ours(host):
        return None
    links = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    return next((pid for pid in _pids() if links & _fd_links(pid)), None)


def with_environment(name: str, value: str) -> list[int]:
    """Live processes that were started with this environment variable."""
    entry = f"{name}={value}".encode()
    return [pid for pid in _pids() if entry in _read(pid, "environ").split(b"\0") and not _is_zombie(pid)]


def title(pid: int) -> str:
    """The command line, or what the process calls itself; empty once it is gone."""
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def _is_ours(host: str) -> bool:
    """Only a machine's own addresses can be bound. Another machine's port may be in use here by somebody else."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _pids() -> Iterator[int]:
    yield from sorted(int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes


def _fd_links(pid: int) -> set[str]:
    links = set()
    with contextlib.suppress(OSError):
        for descriptor in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                links.add(str(descriptor.readlink()))
    return links


def _is_zombie(pid: int) -> bool:
    return b") Z " in _read(pid, "stat")


def _read(pid: int, name: str) -> bytes:
    try:
        return (_PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""
