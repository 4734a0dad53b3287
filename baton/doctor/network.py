"""Checks of addresses and ports, the store in which pairs meet, and a Ray cluster to join."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from datetime import timedelta

from baton.doctor.finding import Finding, note, ok, skipped, wrong
from kv_transfer.rendezvous import StoreServer, connect_store
from kv_transfer.transport import TransferError

SLOW_STORE_S = 1.0
_STORE_TIMEOUT_S, _CONNECT_TIMEOUT_S, RAY_TIMEOUT_S = 20.0, 3.0, 30.0
# Ray stays out of the doctor's process: it starts threads, and a version that differs from the cluster's ends it.
_ASK_RAY = """
import json, sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(json.dumps({"nodes": len(ray.nodes()), "resources": ray.cluster_resources()}))
"""


def ports(host: str, wanted: dict[str, int]) -> list[Finding]:
    """Whether the router can listen there. `wanted`: port by purpose; 0 takes any."""
    return [_port(host, purpose, port) for purpose, port in wanted.items()]


def _port(host: str, purpose: str, port: int) -> Finding:
    check = f"{purpose} port"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        return wrong(check, f"{host} has no address: {error.strerror}", "name an address of this machine (--host)")
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except OSError as error:
            change = f"stop what listens on {port}, or choose another (0 takes any)"
            if error.errno in (99, 49):  # EADDRNOTAVAIL of Linux and macOS
                change = f"{host} is no address of this machine: name one that is"
            return wrong(check, f"{host}:{port}: {error.strerror}", change)
    return ok(check, f"{host}:{port or 'any'} is free")


def store(host: str) -> list[Finding]:
    """The rendezvous of a pair: made on `host`, reached there, and how long that takes."""
    try:
        server = StoreServer(host)
    except TransferError as error:
        change = "set cluster.worker_host to an address of this machine that the other workers reach"
        return [wrong("store", str(error), change)]
    try:
        started = time.monotonic()
        client = connect_store(server.host, server.port, _STORE_TIMEOUT_S)
        client.set_timeout(timedelta(seconds=_CONNECT_TIMEOUT_S))
        client.set("doctor", "1")
        answer = server.store.get("doctor")
        seconds = time.monotonic() - started
    except (TransferError, RuntimeError) as error:
        text = f"a store on {host}:{server.port} cannot be reached: {str(error).splitlines()[0]}"
        return [wrong("store", text, "let a firewall or network policy pass connections between workers")]
    finally:
        server.close()
    if answer != b"1":
        return [wrong("store", f"{host}:{server.port} answers {answer!r}", "report this with its output")]
    text = f"made and reached on {host} in {seconds * 1e3:.0f} ms"
    if seconds > SLOW_STORE_S:
        change = "repair name resolution, or run workers with RES_OPTIONS='timeout:1 attempts:1'"
        return [note("store", f"{text}: name lookups wait for their timeout", change)]
    return [ok("store", text)]


def ray_cluster(address: str | None, timeout_s: float = RAY_TIMEOUT_S) -> list[Finding]:
    """A cluster to join: reachable, of the same Ray and Python, and what it offers."""
    if address is None:
        return [skipped("ray cluster", "none named (--ray-address); `baton serve` starts one of its own")]
    where = address.removeprefix("ray://")
    host, _, port = where.rpartition(":")
    if address != "auto" and port.isdigit():
        try:
            socket.create_connection((host or "127.0.0.1", int(port)), _CONNECT_TIMEOUT_S).close()
        except OSError as error:
            change = "check the address, that the head node runs, and that its port is open from here"
            return [wrong("ray cluster", f"{address} cannot be reached: {error.strerror or error}", change)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_RAY, address], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return [wrong("ray cluster", f"{address} did not answer within {timeout_s:g} s", "look at `ray status` there")]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        change = "give this environment the Ray and Python versions of the cluster"
        return [wrong("ray cluster", f"{address} does not take us: {reason}", change)]
    said = json.loads(done.stdout.splitlines()[-1])
    gpus = int(said["resources"].get("GPU", 0))
    return [ok("ray cluster", f"{address}: {said['nodes']} nodes, {gpus} GPUs")]
