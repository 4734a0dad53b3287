"""The manifests as Python objects: the files as they are, and what `kubectl kustomize` makes of the overlays."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.deploy.crd_schema import CrdSchema, load_crd

Resource = dict[str, Any]

REPOSITORY = Path(__file__).parents[3]
DEPLOY = REPOSITORY / "deploy"
OVERLAYS = ("cpu-demo", "two-gpu", "two-gpu-ha")
CRDS_VARIABLE = "BATON_KUBERAY_CRDS"
_NOT_RESOURCES = ("Kustomization", "Component")


def resource_files() -> list[Path]:
    """Files that hold whole resources, as against patches, settings and kustomizations."""
    return [file for file in sorted(DEPLOY.rglob("*.yaml")) if any(is_resource(document) for document in read(file))]


def is_resource(document: Any) -> bool:
    return isinstance(document, dict) and "apiVersion" in document and document.get("kind") not in _NOT_RESOURCES


def read(file: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(file.read_text(encoding="utf-8")) if document is not None]


def base_cluster() -> Resource:
    [cluster] = read(DEPLOY / "base" / "raycluster.yaml")
    assert isinstance(cluster, dict)
    return cluster


@cache
def _rendered_text(overlay: str) -> str:
    command = ["kubectl", "kustomize", str(DEPLOY / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def rendered(overlay: str) -> list[Resource]:
    """All resources of an overlay. Skips the test where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: overlays are not rendered, only their files are checked")
    return list(yaml.safe_load_all(_rendered_text(overlay)))


def one(resources: list[Resource], kind: str) -> Resource:
    [found] = [resource for resource in resources if resource["kind"] == kind]
    return found


def pod_templates(cluster: Resource) -> Iterator[tuple[str, Resource]]:
    """(group, pod template) of every group of a RayCluster."""
    yield "headgroup", cluster["spec"]["headGroupSpec"]["template"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def group(cluster: Resource, name: str) -> Resource:
    [found] = [entry for entry in cluster["spec"]["workerGroupSpecs"] if entry["groupName"] == name]
    assert isinstance(found, dict)
    return found


def container(template: Resource, name: str) -> Resource:
    [found] = [entry for entry in template["spec"]["containers"] if entry["name"] == name]
    assert isinstance(found, dict)
    return found


def kuberay_errors(resource: Resource) -> list[str]:
    """What KubeRay's definitions refuse of a ray.io resource. They are no part of this project: skips without them."""
    directory = Path(os.environ.get(CRDS_VARIABLE) or REPOSITORY.parent / "shared" / "kuberay-crds")
    if not directory.is_dir():
        pytest.skip(f"no KubeRay CRDs: set {CRDS_VARIABLE} to a directory with them to check the ray.io resources")
    return _crd(directory, resource["apiVersion"], resource["kind"]).errors(resource)


@cache
def _crd(directory: Path, api_version: str, kind: str) -> CrdSchema:
    group_name, version = api_version.split("/")
    return load_crd(directory / f"{group_name}_{kind.lower()}s.yaml", version)
