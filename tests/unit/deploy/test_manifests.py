"""Every manifest against its schema: core kinds with Kubernetes' schemas, ray.io kinds with KubeRay's definitions.

No schema checks the kinds of the Prometheus operator (test_monitoring.py has their queries) nor KubeRay's rules in CEL.
No API server and no operator has seen these manifests here.
"""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate  # type: ignore[import-untyped]
import pytest

from tests.unit.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    Resource,
    is_resource,
    kuberay_errors,
    one,
    pod_templates,
    read,
    rendered,
    resource_files,
)

# The oldest release whose schema knows all that we use, and the newest that the package has.
_RELEASES = ("1.30", "1.37")
_WITHOUT_SCHEMA = ("monitoring.coreos.com/",)


def _check_core(resources: list[Resource]) -> int:
    """Number of resources checked, the pod templates of Ray clusters among them."""
    checked = 0
    for resource in resources:
        if resource["kind"] == "RayCluster":
            checked += _check_core([_as_pod(name, template) for name, template in pod_templates(resource)])
        elif not resource["apiVersion"].startswith(_WITHOUT_SCHEMA):
            for release in _RELEASES:
                kubernetes_validate.validate(resource, release, strict=True)
            checked += 1
    return checked


def _as_pod(name: str, template: Resource) -> Resource:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name} | template.get("metadata", {})} | {
        "spec": template["spec"]
    }


def _check_custom(resources: list[Resource]) -> int:
    custom = [resource for resource in resources if resource["apiVersion"].startswith("ray.io/")]
    for resource in custom:
        assert kuberay_errors(resource) == []
    return len(custom)


@pytest.mark.parametrize("file", resource_files(), ids=lambda file: str(file.relative_to(DEPLOY)))
def test_files_are_valid_core_resources(file: Path) -> None:
    documents = read(file)
    assert all(is_resource(document) for document in documents)
    _check_core(documents)


def test_base_cluster_is_valid_for_kuberay() -> None:
    assert _check_custom(read(DEPLOY / "base" / "raycluster.yaml")) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rendered_overlays_are_valid(overlay: str) -> None:
    resources = rendered(overlay)
    assert _check_core(resources) > 8
    assert _check_custom(resources) == 1


def test_a_misspelt_field_of_a_pod_template_is_found() -> None:
    """Guards the check itself on the real definitions."""
    [cluster] = read(DEPLOY / "base" / "raycluster.yaml")
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    [error] = kuberay_errors(cluster)
    assert error.startswith("$.spec.headGroupSpec.template.spec.containers[0]:")
    assert "'volumeMount' was unexpected" in error


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_config_map_that_is_named_exists(overlay: str) -> None:
    """Generated names carry a hash; a reference that kustomize does not know of keeps the bare name."""
    resources = rendered(overlay)
    existing = {resource["metadata"]["name"] for resource in resources if resource["kind"] == "ConfigMap"}
    named = set()
    for _, template in pod_templates(one(resources, "RayCluster")):
        for volume in template["spec"]["volumes"]:
            named |= {volume["configMap"]["name"]} if "configMap" in volume else set()
        for entry in template["spec"]["containers"]:
            named |= {source["configMapRef"]["name"] for source in entry.get("envFrom", [])}
    assert any(name.startswith("baton-config-") for name in named)
    assert named <= existing


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_baton_container_has_the_image_of_the_overlay(overlay: str) -> None:
    containers = [
        entry
        for _, template in pod_templates(one(rendered(overlay), "RayCluster"))
        for entry in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]
    ]
    images = {entry["image"] for entry in containers}
    assert len(images) == 1
    assert images.pop().startswith("baton:")
