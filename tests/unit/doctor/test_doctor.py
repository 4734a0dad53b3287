"""Every fault that the doctor knows, put in its way, and what it says of a machine without one."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.cli.main import app
from baton.doctor import gpus, machine, network, pairs
from baton.doctor.finding import Finding, Status, run_check
from baton.doctor.gpus import Gpus, ToolFailed, topology

GIB = 1 << 30
TWO_LINKED = Gpus(2, frozenset({(0, 1), (1, 0)}))


def statuses(findings: Sequence[Finding]) -> list[Status]:
    return [finding.status for finding in findings]


def only(findings: Sequence[Finding]) -> Finding:
    [finding] = findings
    return finding


def assert_wrong(finding: Finding, *words: str) -> None:
    """It says what is wrong, and what to change."""
    assert finding.status is Status.WRONG, finding
    assert finding.change, finding
    for word in words:
        assert word in f"{finding.text} {finding.change}", finding


# ---- the machine

GOOD = {"torch": "2.11.0+cu130", "ray": "2.60.0", "triton": "3.6.0"}


def installed(**changes: str | None) -> Callable[[str], str]:
    def version_of(name: str) -> str:
        version = {**GOOD, **changes}[name]
        if version is None:
            raise PackageNotFoundError(name)
        return version

    return version_of


def test_supported_versions() -> None:
    assert set(statuses(machine.versions(installed(), (3, 12, 1)))) == {Status.OK}
    assert Status.SKIPPED in statuses(machine.versions(installed(triton=None), (3, 11, 0)))


@pytest.mark.parametrize(
    ("changes", "python", "names"),
    [
        ({"torch": "2.10.1"}, (3, 11, 0), "torch"),
        ({"torch": "2.14.0"}, (3, 11, 0), "torch"),
        ({"ray": "2.59.1"}, (3, 11, 0), "ray"),
        ({"ray": None}, (3, 11, 0), "ray"),
        ({}, (3, 10, 9), "python"),
        ({}, (3, 13, 0), "python"),
    ],
)
def test_unsupported_versions(changes: dict[str, str | None], python: tuple[int, ...], names: str) -> None:
    found = [one for one in machine.versions(installed(**changes), python) if one.status is not Status.OK]
    assert only(found).check == names
    assert_wrong(only(found))


def test_variables() -> None:
    assert statuses(machine.environment({"PATH": "/bin", "NCCL_NVLS_ENABLE": "0"})) == [Status.OK]
    assert_wrong(only(machine.environment({"NCCL_P2P_DISABLE": "1"})), "unset NCCL_P2P_DISABLE")
    noted = machine.environment({"NCCL_NVLS_ENABLE": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_ADDRESS": "a:1"})
    assert statuses(noted) == [Status.NOTE] * 3


def test_too_few_open_files() -> None:
    assert_wrong(only(machine.open_files((1024, 4096))), "1024", "ulimit")
    assert statuses(machine.open_files((65536, 65536))) == [Status.OK]
    unlimited = resource.RLIM_INFINITY
    assert "unlimited" in only(machine.open_files((unlimited, unlimited))).text


def test_shared_memory_of_a_container() -> None:
    assert_wrong(only(machine.shared_memory(sizes=(64 << 20, 64 << 20))), "64 MiB", "--shm-size")
    assert statuses(machine.shared_memory(sizes=(512 << 20, 512 << 20))) == [Status.NOTE]
    assert statuses(machine.shared_memory(sizes=(8 * GIB, 8 * GIB))) == [Status.OK]
    assert_wrong(only(machine.shared_memory(Path("/nonexistent"))), "tmpfs")


def test_a_machine_that_sleeps_too_long(tmp_path: Path) -> None:
    assert_wrong(machine.clock(lambda _: time.sleep(0.03), tmp_path / "none")[0], "heartbeats")
    source = tmp_path / "source"
    source.write_text("hpet\n")
    assert machine.clock(lambda _: None, source)[1].status is Status.NOTE
    source.write_text("tsc\n")
    assert statuses(machine.clock(lambda _: None, source)) == [Status.OK]


# ---- the network


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_ports(taken_port: int) -> None:
    taken, free = network.ports("127.0.0.1", {"HTTP": taken_port, "gRPC": 0})
    assert_wrong(taken, str(taken_port), "choose another")
    assert free.status is Status.OK


def test_addresses_of_others() -> None:
    assert_wrong(only(network.ports("203.0.113.7", {"HTTP": 0})), "no address of this machine")
    assert_wrong(only(network.ports("no-such-host.invalid", {"HTTP": 0})), "no address")
    assert_wrong(only(network.store("203.0.113.7")), "cluster.worker_host")


def test_the_store() -> None:
    assert only(network.store("127.0.0.1")).status is Status.OK


def test_a_store_that_is_slow_to_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "SLOW_STORE_S", 0.0)
    slow = only(network.store("127.0.0.1"))
    assert slow.status is Status.NOTE
    assert "RES_OPTIONS" in slow.change


def test_a_ray_cluster_that_is_not_there(taken_port: int) -> None:
    assert only(network.ray_cluster(None)).status is Status.SKIPPED
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert_wrong(only(network.ray_cluster(f"127.0.0.1:{port}")), "cannot be reached")
    assert_wrong(only(network.ray_cluster(f"127.0.0.1:{taken_port}", timeout_s=0.2)), "did not answer")


# ---- GPUs


class Tools:
    """`nvidia-smi` and torch with the given answers; an exception is raised."""

    def __init__(self, driver: str | ToolFailed, torch: dict[str, object] | ToolFailed, topo: str = "") -> None:
        self._driver, self._torch, self._topo = driver, torch, topo

    def __call__(self, command: Sequence[str], _timeout_s: float) -> str:
        answer = self._driver if command[0] == "nvidia-smi" else self._torch
        if "topo" in command:
            answer = self._topo
        if isinstance(answer, ToolFailed):
            raise answer
        return answer if isinstance(answer, str) else json.dumps(answer)


def gpu(**changes: object) -> dict[str, object]:
    return {"name": "H", "capability": [9, 0], "free": 80 * GIB, "total": 80 * GIB, "sum": 1024.0, **changes}


def torch_sees(
    *seen: dict[str, object], cuda: str | None = "13.0", peers: Sequence[Sequence[int]] = ()
) -> dict[str, object]:
    return {"torch": "2.11.0", "cuda": cuda, "gpus": list(seen), "peers": list(peers)}


TWO_OF_A_DRIVER = "580.1, Disabled\n580.1, Disabled\n"
NO_DRIVER = ToolFailed("nvidia-smi: No such file or directory")


def test_a_machine_without_gpus_is_no_fault() -> None:
    found, known = gpus.gpus(Tools(NO_DRIVER, torch_sees(cuda=None)))
    assert set(statuses(found)) == {Status.SKIPPED}
    assert known.count == 0
    assert statuses(gpus.links(known)) == [Status.SKIPPED]


def test_gpus_that_are_hidden_on_purpose() -> None:
    found, _ = gpus.gpus(Tools(TWO_OF_A_DRIVER, torch_sees()), {"CUDA_VISIBLE_DEVICES": ""})
    assert statuses(found) == [Status.OK, Status.SKIPPED]


def test_two_good_gpus() -> None:
    found, known = gpus.gpus(Tools(TWO_OF_A_DRIVER, torch_sees(gpu(), gpu(), peers=[[0, 1], [1, 0]])))
    assert set(statuses(found)) == {Status.OK}
    assert known == TWO_LINKED


@pytest.mark.parametrize(
    ("driver", "torch", "word"),
    [
        (TWO_OF_A_DRIVER, torch_sees(cuda=None), "CPU build"),
        (TWO_OF_A_DRIVER, torch_sees(), "update the driver"),
        (TWO_OF_A_DRIVER, ToolFailed("python did not end within 60 s"), "Xid"),
        (TWO_OF_A_DRIVER, torch_sees(gpu(free=40 * GIB)), "another program"),
        (TWO_OF_A_DRIVER, torch_sees(gpu(capability=[7, 5])), "7.5"),
        (TWO_OF_A_DRIVER, torch_sees(gpu(sum=1023.0)), "out of service"),
        ("580.1, Enabled\n", torch_sees(gpu()), "MIG"),
    ],
)
def test_faults_of_gpus(driver: str, torch: dict[str, object] | ToolFailed, word: str) -> None:
    found, _ = gpus.gpus(Tools(driver, torch))
    assert_wrong(only([one for one in found if one.status is not Status.OK]), word)


TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31
GPU1\tNV18\t X \tPHB\tSYS\t0-31
GPU2\tSYS\tPHB\t X \tSYS\t32-63
NIC0\tPIX\tSYS\tSYS\t X
"""


def test_links_are_read_from_the_topology() -> None:
    assert topology(TOPOLOGY) == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "PHB"}
    linked = gpus.links(TWO_LINKED, Tools("", {}, "GPU0\t X \tNV18\nGPU1\tNV18\t X \n"))
    assert statuses(linked) == [Status.OK]
    assert "NV18" in only(linked).text


def test_links_that_are_slow_or_missing() -> None:
    over_pcie = gpus.links(TWO_LINKED, Tools("", {}, "GPU0\t X \tPHB\nGPU1\tPHB\t X \n"))
    assert statuses(over_pcie) == [Status.NOTE]
    assert "PHB" in only(over_pcie).text
    one_way = gpus.links(Gpus(2, frozenset({(0, 1)})), Tools("", {}, ""))
    assert_wrong(only(one_way), "0-1", "ACS")


# ---- pairs


def test_pairs_to_try() -> None:
    assert pairs.pairs_to_try(2) == [(0, 1)]
    assert len(pairs.pairs_to_try(4)) == 6
    of_eight = pairs.pairs_to_try(8)
    assert sorted(index for pair in of_eight for index in pair) == sorted([*range(8)] * 2)


def test_a_gloo_pair_between_two_processes() -> None:
    found = only(pairs.connections(Gpus(0, frozenset()), "127.0.0.1", (), 120.0))
    assert found.status is Status.OK, found
    assert "intact" in found.text


def test_a_pair_that_hangs_is_a_finding() -> None:
    started = time.monotonic()
    found = only(pairs.connections(TWO_LINKED, "127.0.0.1", (), 1.5, "tests.support.hanging_end"))
    assert_wrong(found, "1.5 s", "NCCL_DEBUG")
    assert time.monotonic() - started < 30


def test_a_pair_that_fails_says_why() -> None:
    found = only(pairs.connections(TWO_LINKED, "127.0.0.1", (), 30.0, "json.tool"))
    assert_wrong(found, "json.tool: error")


# ---- the whole


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise OSError("disk on fire")

    assert_wrong(only(run_check("disk", broken)), "disk on fire")


def test_the_command(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    monkeypatch.setattr(pairs, "connections", lambda *_: [])
    monkeypatch.setattr(gpus, "gpus", lambda: ([], Gpus(0, frozenset())))
    monkeypatch.setattr(machine, "clock", list)  # other work on this machine is no fault of ours
    fine = CliRunner().invoke(app, ["doctor", "--port", "0", "--grpc-port", "0"])
    assert fine.exit_code == 0, fine.output
    assert "0 to change" in fine.output
    faulty = CliRunner().invoke(app, ["doctor", "--port", str(taken_port), "--grpc-port", "0"])
    assert faulty.exit_code == 1
    assert "choose another" in faulty.output
