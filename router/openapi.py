"""The OpenAPI document: FastAPI's own, with the request body that the handler parses by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from router.openai_schema import CompletionRequest

_TEMPLATE = "#/components/schemas/{model}"
_SCHEMA = CompletionRequest.model_json_schema(ref_template=_TEMPLATE)
_DEFINITIONS = _SCHEMA.pop("$defs", {})

COMPLETION_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": _SCHEMA}}},
}


def document(app: FastAPI) -> dict[str, Any]:
    """To be called once, when all routes are in."""
    content = app.openapi()
    content.setdefault("components", {}).setdefault("schemas", {}).update(_DEFINITIONS)
    return content
