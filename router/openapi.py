"""The OpenAPI document: FastAPI's own, with the bodies that handlers read by themselves and what they answer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.api_answers import ErrorAnswer

_TEMPLATE = "#/components/schemas/{model}"
_REASONS = {
    400: "The request cannot be served as it is; `param` names the field",
    404: "No such model or request",
    413: "The body is larger than this server takes",
    429: "Too many requests; see Retry-After",
    503: "No worker can take the request",
    504: "The request's deadline passed",
}
_EVENT = {
    "type": "object",
    "description": "One event; the last one's data is [DONE], that of all others JSON",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_OF_BODIES = (400, 413, 429, 503)
_OF_GENERATION = (*_OF_BODIES, 404, 504)


class Document:
    """Collects what the routes say of themselves. One per application."""

    def __init__(self) -> None:
        self._models: dict[str, type[BaseModel]] = {"ErrorAnswer": ErrorAnswer}

    def generation(self, body: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
        """Arguments of a route that answers whole or as a stream of events."""
        content = {**self._json(answer), "text/event-stream": {"schema": _EVENT}}
        return self._route(content, "The whole answer, or with `stream` its chunks", _OF_GENERATION, [body])

    def post(self, answer: type[BaseModel], *bodies: type[BaseModel]) -> dict[str, Any]:
        """Arguments of a route that takes one of these bodies."""
        return self._route(self._json(answer), "The answer", (*_OF_BODIES, 404), list(bodies))

    def get(self, answer: type[BaseModel], *errors: int) -> dict[str, Any]:
        return self._route(self._json(answer), "The answer", errors, [])

    def status(self, answer: type[BaseModel]) -> dict[str, Any]:
        """Arguments of a route that answers the same with 200 and 503."""
        route = self._route(self._json(answer), "Yes", (), [])
        route["responses"][503] = {"description": "No", "content": self._json(answer)}
        return route

    def text(self, media_type: str) -> dict[str, Any]:
        return self._route({media_type: {"schema": {"type": "string"}}}, "The answer", (), [])

    def finish(self, app: FastAPI) -> dict[str, Any]:
        """To be called once, when all routes are in."""
        content = app.openapi()
        models = [(model, "validation") for model in self._models.values()]
        _, schemas = models_json_schema(models, ref_template=_TEMPLATE)  # type: ignore[arg-type]
        content.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        for operations in content["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return content

    def _route(
        self, content: dict[str, Any], description: str, errors: tuple[int, ...], bodies: list[type[BaseModel]]
    ) -> dict[str, Any]:
        responses: dict[int, dict[str, Any]] = {200: {"description": description, "content": content}}
        for status in sorted(errors):
            responses[status] = {"description": _REASONS[status], "content": self._json(ErrorAnswer)}
        if not bodies:
            return {"responses": responses}
        schemas = [self._json(body)["application/json"]["schema"] for body in bodies]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        request_body = {"required": True, "content": {"application/json": {"schema": schema}}}
        return {"responses": responses, "openapi_extra": {"requestBody": request_body}}

    def _json(self, model: type[BaseModel]) -> dict[str, Any]:
        self._models[model.__name__] = model
        return {"application/json": {"schema": {"$ref": _TEMPLATE.format(model=model.__name__)}}}
