"""`baton doctor`: checks this machine, prints what is wrong and what to change; exit code 1 when something must be."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from baton.doctor import gpus, machine, network, pairs
from baton.doctor.finding import Finding, Status, run_check

Flag = typer.Option
_STYLES = {Status.OK: "green", Status.NOTE: "yellow", Status.SKIPPED: "dim", Status.WRONG: "bold red"}


def doctor(
    host: Annotated[str, Flag(help="Address on which the router would listen.")] = "127.0.0.1",
    port: Annotated[int, Flag(min=0, max=65535, help="HTTP port.")] = 8000,
    grpc_port: Annotated[int, Flag(min=0, max=65535, help="gRPC port.")] = 8001,
    worker_host: Annotated[
        str | None, Flag(help="Address on which workers would listen [loopback; with --ray-address this node's].")
    ] = None,
    ray_address: Annotated[str | None, Flag(help="A Ray cluster to join.")] = None,
    pair_timeout: Annotated[float, Flag(min=1.0, help="Seconds for each pair to connect and move data.")] = 30.0,
) -> None:
    """Check GPUs, links, NCCL pairs, ports, shared memory, limits, versions and Ray on this machine."""
    console = Console(highlight=False)
    workers = worker_host or (socket.gethostname() if ray_address else socket.gethostbyname("localhost"))
    counts = dict.fromkeys(Status, 0)
    for finding in findings(host, {"HTTP": port, "gRPC": grpc_port}, workers, ray_address, pair_timeout):
        counts[finding.status] += 1
        print_finding(console, finding)
    console.print(f"{counts[Status.WRONG]} to change, {counts[Status.NOTE]} notes, {counts[Status.SKIPPED]} skipped")
    if counts[Status.WRONG]:
        raise typer.Exit(1)


def findings(
    host: str, wanted_ports: dict[str, int], worker_host: str, ray_address: str | None, pair_timeout_s: float
) -> Iterator[Finding]:
    """All checks, the quick ones first, each finding as soon as it is made."""
    yield from run_check("versions", machine.versions)
    yield from run_check("environment", machine.environment)
    yield from run_check("open files", machine.open_files)
    yield from run_check("shared memory", machine.shared_memory)
    yield from run_check("clock", machine.clock)
    yield from run_check("ports", lambda: network.ports(host, wanted_ports))
    yield from run_check("store", lambda: network.store(worker_host))
    yield from run_check("ray cluster", lambda: network.ray_cluster(ray_address))
    known = gpus.Gpus(0, frozenset())

    def look() -> list[Finding]:
        nonlocal known
        found, known = gpus.gpus()
        return found

    yield from run_check("GPUs", look)
    yield from run_check("links", lambda: gpus.links(known))
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    yield from run_check("pairs", lambda: pairs.connections(known, worker_host, visible, pair_timeout_s))


def print_finding(console: Console, finding: Finding) -> None:
    style = _STYLES[finding.status]
    line = f"[{style}]{finding.status.value:>7}[/]  {finding.check}: {escape(finding.text)}"
    console.print(line, soft_wrap=True)
    if finding.change:
        console.print(f"         [bold]->[/] {escape(finding.change)}", soft_wrap=True)
