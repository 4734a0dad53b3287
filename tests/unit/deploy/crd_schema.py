"""Checks custom resources as strictly as an API server with `fieldValidation=Strict` does, from the CRD alone.

Unknown fields are errors, structural defaults are applied first, keys of list maps are unique. Not covered: CEL rules
(`x-kubernetes-validations`). Used by the manifest tests.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import yaml

Schema = dict[str, Any]

_METADATA: Schema = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
_STRINGS = {"type": "string"}
_REWRITTEN = {"properties", "items", "additionalProperties", "nullable", "default", "format", "description"}
# The safe loader in C where there is one: these files have megabytes.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class CrdSchema:
    """The schema of one served version of one kind."""

    def __init__(self, schema: Schema) -> None:
        self._structural = copy.deepcopy(schema)
        properties = self._structural.setdefault("properties", {})
        properties.update({"apiVersion": _STRINGS, "kind": _STRINGS, "metadata": _METADATA})
        self._validator = jsonschema.Draft202012Validator(closed(self._structural))

    def errors(self, resource: Any) -> list[str]:
        """What is wrong, one line each with the path of the field. The resource itself stays as it is."""
        defaulted = with_defaults(self._structural, resource)
        wrong = [f"{error.json_path}: {error.message}" for error in self._validator.iter_errors(defaulted)]
        return sorted(wrong) + duplicates(self._structural, defaulted, "$")


def load_crd(file: Path, version: str) -> CrdSchema:
    """The schema of one served version in the file of a CustomResourceDefinition."""
    spec = yaml.load(file.read_text(encoding="utf-8"), _LOADER)["spec"]
    [schema] = [entry["schema"] for entry in spec["versions"] if entry["name"] == version and entry["served"]]
    return CrdSchema(schema["openAPIV3Schema"])


def closed(schema: Schema) -> Schema:
    """The JSON Schema that allows a field only where the structural schema names it or says that it keeps any."""
    result = {key: value for key, value in schema.items() if not key.startswith("x-") and key not in _REWRITTEN}
    if "properties" in schema:
        result["properties"] = {name: closed(child) for name, child in schema["properties"].items()}
    if "items" in schema:
        result["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = closed(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = schema.get("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, _STRINGS]
    elif "type" in result and schema.get("nullable"):
        result["type"] = [result["type"], "null"]
    return result


def with_defaults(schema: Schema, value: Any) -> Any:
    """A copy of the value in which missing fields have their structural defaults."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        result = {}
        for name, child in value.items():
            known = properties.get(name, rest if isinstance(rest, dict) else {})
            result[name] = with_defaults(known, child)
        for name, child in properties.items():
            if name not in result and "default" in child:
                result[name] = with_defaults(child, copy.deepcopy(child["default"]))
        return result
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), child) for child in value]
    return value


def duplicates(schema: Schema, value: Any, path: str) -> list[str]:
    """Entries of a list map that share all its keys, and repeated values of a set."""
    wrong: list[str] = []
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name, child in value.items():
            wrong += duplicates(properties.get(name, {}), child, f"{path}.{name}")
    elif isinstance(value, list):
        seen: list[Any] = []
        for index, child in enumerate(value):
            here = f"{path}[{index}]"
            wrong += duplicates(schema.get("items", {}), child, here)
            identity = _identity(schema, child)
            if identity is not None and identity in seen:
                wrong.append(f"{here}: appears twice: {identity}")
            seen.append(identity)
    return wrong


def _identity(schema: Schema, child: Any) -> Any:
    match schema.get("x-kubernetes-list-type"):
        case "map" if isinstance(child, dict):
            return [child.get(key) for key in schema["x-kubernetes-list-map-keys"]]
        case "set":
            return child
        case _:
            return None
