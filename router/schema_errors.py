"""Request models of pydantic, checked, with errors that name the field as OpenAI's API does. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from baton.common.errors import InvalidRequest

_Model = TypeVar("_Model", bound=BaseModel)


def validated(
    model: type[_Model], fields: Mapping[str, object], unsupported: type[BaseModel] | None = None
) -> tuple[_Model, int]:
    """The request, and how many fields the model does not know, which are ignored. Raises InvalidRequest.

    `unsupported`: the model whose fields are refused because this server has nothing of the kind.
    """
    known = {name: value for name, value in fields.items() if name in model.model_fields}
    try:
        return model.model_validate(known), len(fields) - len(known)
    except ValidationError as error:
        raise _invalid(error, unsupported) from None


def _invalid(error: ValidationError, unsupported: type[BaseModel] | None) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0])
    if unsupported is not None and param in unsupported.model_fields:
        return InvalidRequest(f"{param} is not supported by this server", param, "unsupported_parameter")
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is required", param, "missing_required_parameter")
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return InvalidRequest(f"{param}: {first['msg']}", param, code)
