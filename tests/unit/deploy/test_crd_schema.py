"""The strict check itself: what it must refuse and what it must let pass."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.deploy.crd_schema import CrdSchema

_SPEC: dict[str, Any] = {
    "type": "object",
    "required": ["count"],
    "properties": {
        "count": {"type": "integer", "default": 1},
        "mode": {"type": "string", "enum": ["a", "b"]},
        "port": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
        "memory": {"pattern": "^[0-9]+Gi$", "x-kubernetes-int-or-string": True},
        "maybe": {"type": "string", "nullable": True},
        "free": {
            "type": "object",
            "x-kubernetes-preserve-unknown-fields": True,
            "properties": {"n": {"type": "integer"}},
        },
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "empty": {"type": "object"},
        "ports": {
            "type": "array",
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["port", "protocol"],
            "items": {
                "type": "object",
                "required": ["port", "protocol"],
                "properties": {"port": {"type": "integer"}, "protocol": {"type": "string", "default": "TCP"}},
            },
        },
    },
}
_SCHEMA = CrdSchema(
    {"type": "object", "required": ["spec"], "properties": {"spec": _SPEC, "metadata": {"type": "object"}}}
)


def _errors(spec: dict[str, Any], **rest: Any) -> list[str]:
    return _SCHEMA.errors({"apiVersion": "x/v1", "kind": "X", "metadata": {"name": "x"}, "spec": spec} | rest)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"count": 2, "mode": "a"},
        {"port": 80},
        {"port": "http"},
        {"memory": "4Gi"},
        {"memory": 4},
        {"maybe": None},
        {"free": {"n": 1, "anything": {"goes": True}}},
        {"labels": {"any": "name"}},
        {"empty": {}},
        {"ports": [{"port": 1}, {"port": 1, "protocol": "UDP"}]},
    ],
)
def test_accepts(spec: dict[str, Any]) -> None:
    assert _errors(spec) == []


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"cuont": 2}, "$.spec: Additional properties are not allowed ('cuont' was unexpected)"),
        ({"count": "2"}, "$.spec.count: '2' is not of type 'integer'"),
        ({"count": None}, "$.spec.count: None is not of type 'integer'"),
        ({"mode": "c"}, "$.spec.mode: 'c' is not one of ['a', 'b']"),
        ({"port": 1.5}, "$.spec.port: 1.5 is not valid under any of the given schemas"),
        ({"memory": "4GB"}, "$.spec.memory: '4GB' does not match '^[0-9]+Gi$'"),
        ({"free": {"n": "1"}}, "$.spec.free.n: '1' is not of type 'integer'"),
        ({"labels": {"any": 1}}, "$.spec.labels.any: 1 is not of type 'string'"),
        ({"empty": {"a": 1}}, "$.spec.empty: Additional properties are not allowed ('a' was unexpected)"),
        ({"ports": [{"port": 1, "name": "a"}]}, "Additional properties are not allowed ('name' was unexpected)"),
        ({"ports": [{"port": 1}, {"port": 1, "protocol": "TCP"}]}, "$.spec.ports[1]: appears twice: [1, 'TCP']"),
    ],
)
def test_refuses(spec: dict[str, Any], complaint: str) -> None:
    [error] = _errors(spec)
    assert complaint in error


def test_refuses_unknown_fields_beside_the_spec() -> None:
    [error] = _errors({}, sepc={})
    assert "'sepc' was unexpected" in error
    [error] = _errors({}, metadata={"name": "x", "label": {}})
    assert "'label' was unexpected" in error


def test_does_not_change_what_it_checks() -> None:
    spec: dict[str, Any] = {"ports": [{"port": 1}]}
    _errors(spec)
    assert spec == {"ports": [{"port": 1}]}
