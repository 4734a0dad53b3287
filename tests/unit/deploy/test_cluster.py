"""Where the manifests, the configuration and the code have to agree."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
from pathlib import Path

import pytest

from baton.common.config import BatonConfig, load_config
from kv_transfer.connection import nccl_environment
from tests.unit.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    Resource,
    base_cluster,
    container,
    group,
    one,
    pod_templates,
    read,
    rendered,
)

_CONFIGS = {file.parent.name: file for file in sorted(DEPLOY.glob("overlays/*/config.yaml"))}
_START_AND_STOP_S = 25  # preStop of the router, the end of the actors, and what a loaded machine adds


def _config(overlay: str) -> BatonConfig:
    return load_config(_CONFIGS.get(overlay, _CONFIGS["two-gpu"]), {})


def _router() -> Resource:
    return container(group(base_cluster(), "router")["template"], "router")


def test_every_overlay_has_a_configuration_that_baton_takes() -> None:
    assert set(_CONFIGS) == {"cpu-demo", "two-gpu"}
    for overlay in _CONFIGS:
        assert _config(overlay).cluster.ray_address is None, "the address is a flag of the router container"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_mounted_configuration_is_the_file(overlay: str) -> None:
    config_map = next(
        resource
        for resource in rendered(overlay)
        if resource["kind"] == "ConfigMap" and resource["metadata"]["name"].startswith("baton-config-")
    )
    mounts = {mount["name"]: mount["mountPath"] for mount in _router()["volumeMounts"]}
    assert f"--config={mounts['config']}/config.yaml" in _router()["args"]
    assert config_map["data"] == {"config.yaml": _CONFIGS.get(overlay, _CONFIGS["two-gpu"]).read_text()}


@pytest.mark.parametrize("overlay", _CONFIGS)
def test_a_worker_group_offers_what_the_workers_of_its_role_ask_for(overlay: str) -> None:
    config = _config(overlay).cluster
    cluster = base_cluster()
    for role, number, wanted in (
        ("prefill", config.prefill, config.prefill_resources),
        ("decode", config.decode, config.decode_resources),
    ):
        entry = group(cluster, role)
        offered = {name: float(value) * entry["replicas"] for name, value in entry["resources"].items()}
        assert number is not None
        assert wanted, "without a custom resource Ray may put a worker into the other role's pod"
        assert {name: amount * number for name, amount in wanted.items()} == offered


def test_the_roles_do_not_share_a_resource() -> None:
    cluster = base_cluster()
    assert not group(cluster, "prefill")["resources"].keys() & group(cluster, "decode")["resources"].keys()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gpus_where_and_only_where_the_configuration_wants_them(overlay: str) -> None:
    wanted = "1" if _config(overlay).cluster.device == "cuda" else None
    for name, template in pod_templates(one(rendered(overlay), "RayCluster")):
        limits = container(template, "ray-head" if name == "headgroup" else "ray-worker")["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == (wanted if name in ("prefill", "decode") else None)
        tolerated = [entry["key"] for entry in template["spec"].get("tolerations", [])]
        assert ("nvidia.com/gpu" in tolerated) == (limits.get("nvidia.com/gpu") is not None)


def test_head_and_router_take_no_actor_that_needs_a_cpu() -> None:
    cluster = base_cluster()
    for params in (cluster["spec"]["headGroupSpec"]["rayStartParams"], group(cluster, "router")["rayStartParams"]):
        assert params["num-cpus"] == "0"
        assert params["num-gpus"] == "0"


def test_nccl_variables_are_those_of_the_code() -> None:
    lines = (DEPLOY / "components" / "gpu" / "nccl.env").read_text().split()
    assert dict(line.split("=", 1) for line in lines) == nccl_environment()


@pytest.mark.parametrize("overlay", ["two-gpu", "two-gpu-ha"])
def test_gpu_pods_get_the_nccl_variables(overlay: str) -> None:
    resources = rendered(overlay)
    data = {resource["metadata"]["name"]: resource["data"] for resource in resources if resource["kind"] == "ConfigMap"}
    for name, template in pod_templates(one(resources, "RayCluster")):
        if name in ("prefill", "decode"):
            [source] = container(template, "ray-worker")["envFrom"]
            assert data[source["configMapRef"]["name"]] == nccl_environment()


def test_ray_is_the_release_of_the_project() -> None:
    assert base_cluster()["spec"]["rayVersion"] == importlib.metadata.version("ray")


def test_the_cluster_is_authenticated_and_the_router_has_its_token() -> None:
    cluster = base_cluster()
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    environment = {entry["name"]: entry for entry in _router()["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    reference = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": cluster["metadata"]["name"], "key": "auth_token"}, "KubeRay's name and key"


def test_the_driver_can_find_and_reach_the_raylet_of_its_pod() -> None:
    template = group(base_cluster(), "router")["template"]
    assert template["spec"]["shareProcessNamespace"] is True
    assert template["spec"]["containers"][0]["name"] == "ray-worker", "KubeRay runs Ray in the first container"
    mounts = [
        {mount["mountPath"]: mount["name"] for mount in entry["volumeMounts"]}
        for entry in template["spec"]["containers"]
    ]
    for path in ("/tmp/ray", "/dev/shm"):
        assert mounts[0][path] == mounts[1][path]
    name = base_cluster()["metadata"]["name"]
    assert f"--ray-address={name}-head-svc:6379" in _router()["args"]


@pytest.mark.parametrize("overlay", _CONFIGS)
def test_ports_of_services_probes_and_policies_are_the_routers(overlay: str) -> None:
    server = _config(overlay).server
    named = {port["name"]: port["containerPort"] for port in _router()["ports"]}
    assert named == {"http": server.port, "grpc": server.grpc_port}
    services = read(DEPLOY / "base" / "services.yaml")
    ports = [port for service in services for port in service["spec"]["ports"]]
    assert {port["targetPort"]: port["port"] for port in ports} == named
    [clients] = [
        policy for policy in read(DEPLOY / "base" / "networkpolicy.yaml") if "clients" in policy["metadata"]["name"]
    ]
    assert {port["port"] for port in clients["spec"]["ingress"][0]["ports"]} == set(named.values())
    assert _router()["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert _router()["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}


def test_the_router_listens_on_the_address_of_its_pod_only() -> None:
    assert "--host=$(POD_IP)" in _router()["args"]
    [pod_ip] = [entry for entry in _router()["env"] if entry["name"] == "POD_IP"]
    assert pod_ip["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"


@pytest.mark.parametrize("overlay", _CONFIGS)
def test_every_pod_lives_until_the_router_has_drained(overlay: str) -> None:
    drain_s = _config(overlay).cluster.drain_timeout_s
    templates = dict(pod_templates(base_cluster()))
    grace_s = {name: template["spec"]["terminationGracePeriodSeconds"] for name, template in templates.items()}
    before_s = _router()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert grace_s["router"] >= before_s + 2 * drain_s + _START_AND_STOP_S, (
        "router and workers drain one after the other"
    )
    assert min(grace_s["prefill"], grace_s["decode"]) > grace_s["router"]
    head_s = container(templates["headgroup"], "ray-head")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before_s + drain_s < head_s < grace_s["headgroup"]


def test_no_container_is_root_or_can_become_it() -> None:
    for _, template in pod_templates(base_cluster()):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["automountServiceAccountToken"] is False
        for entry in template["spec"]["containers"]:
            assert entry["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_shared_memory_is_memory() -> None:
    for _, template in pod_templates(base_cluster()):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes["shared-mem"]["emptyDir"]["medium"] == "Memory"
        assert {mount["name"] for entry in template["spec"]["containers"] for mount in entry["volumeMounts"]} <= set(
            volumes
        )


def test_policies_and_services_select_the_pods_of_this_cluster() -> None:
    name = base_cluster()["metadata"]["name"]
    for file in sorted(DEPLOY.glob("**/networkpolicy.yaml")):
        for policy in read(file):
            labels = policy["spec"]["podSelector"]["matchLabels"]
            assert labels.get("ray.io/cluster") == name or labels == {"app.kubernetes.io/name": "baton-redis"}
    for service in read(DEPLOY / "base" / "services.yaml"):
        assert service["spec"]["selector"] == {"ray.io/cluster": name, "ray.io/group": "router"}


def test_the_driver_waits_for_a_new_head_as_long_as_ray_does() -> None:
    cluster = one(rendered("two-gpu-ha"), "RayCluster")
    assert "redisAddress" in cluster["spec"]["gcsFaultToleranceOptions"]
    environment = {
        entry["name"]: entry.get("value") for entry in container(group(cluster, "router")["template"], "router")["env"]
    }
    assert environment["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600"


@pytest.mark.parametrize(
    "title", [["ray::DecodeWorker"], ["ray::PrefillWorker.start"], ["python", "/usr/local/bin/baton", "serve"]]
)
def test_pre_stop_waits_for_the_process_and_no_longer(title: list[str], tmp_path: Path) -> None:
    """The hook itself, run on this machine with a process that looks like the one it waits for."""
    [_, _, script] = _pre_stop(group(base_cluster(), "decode")["template"])
    script = script.replace("/proc/[0-9]*/cmdline", f"{tmp_path}/[0-9]*/cmdline")
    hook_itself = ["/bin/sh", "-c", script]
    for pid, command in ((1, title), (2, hook_itself)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes(b"\0".join(part.encode() for part in command) + b"\0")
    process = subprocess.Popen(hook_itself, start_new_session=True)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        (tmp_path / "1" / "cmdline").unlink()
        assert process.wait(timeout=30) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _pre_stop(template: Resource) -> list[str]:
    command = container(template, "ray-worker")["lifecycle"]["preStop"]["exec"]["command"]
    assert isinstance(command, list)
    return command


def test_router_pod_and_worker_pods_wait_alike() -> None:
    cluster = base_cluster()
    hooks = [_pre_stop(group(cluster, name)["template"]) for name in ("router", "prefill", "decode")]
    assert hooks[0] == hooks[1] == hooks[2]
