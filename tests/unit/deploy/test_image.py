"""The Dockerfile and what it copies. No image was built by these tests."""

from __future__ import annotations

import re
import tomllib

from tests.unit.deploy.manifests import DEPLOY, REPOSITORY, base_cluster, pod_templates

_DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
_IGNORE = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
_PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def _instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments left out."""
    lines = [line for line in _DOCKERFILE.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines()]


def test_the_base_is_pinned_to_a_patch_release() -> None:
    instructions = _instructions()
    [base] = [arguments for name, arguments in instructions if name == "ARG" and arguments.startswith("BASE=")]
    match = re.fullmatch(r"BASE=python:(\d+)\.(\d+)\.\d+-slim-\w+", base)
    assert match is not None
    low, high = re.findall(r"\d+", _PROJECT["project"]["requires-python"])[:2]
    assert (int(match[1]), int(match[2])) >= (int(low), int(high))
    assert {arguments.split()[0] for name, arguments in instructions if name == "FROM"} == {"${BASE}"}


def test_the_last_stage_runs_as_the_user_of_the_manifests() -> None:
    names = [name for name, _ in _instructions()]
    last_stage = _instructions()[len(names) - 1 - names[::-1].index("FROM") :]
    [user] = [arguments for name, arguments in last_stage if name == "USER"]
    uid, gid = (int(number) for number in user.split(":"))
    assert uid != 0
    for _, template in pod_templates(base_cluster()):
        context = template["spec"]["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (uid, gid, gid)


def test_the_entry_point_is_the_command_of_the_project() -> None:
    [entry] = [arguments for name, arguments in _instructions() if name == "ENTRYPOINT"]
    assert entry == '["baton"]'
    assert "baton" in _PROJECT["project"]["scripts"]


def test_the_build_gets_every_package_and_nothing_else() -> None:
    assert _IGNORE[:1] != ["!"]
    assert "*" in _IGNORE
    sent = {line.removeprefix("!") for line in _IGNORE if line.startswith("!")}
    packages = {name.rstrip("*") for name in _PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert sent == packages | {"pyproject.toml", _PROJECT["project"]["readme"], "LICENSE"}
    assert all((REPOSITORY / name).exists() for name in sent)
