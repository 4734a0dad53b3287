"""Request bodies to fields and prompts. Pure: small bodies are read here on the event loop, others by process.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic_core import from_json, to_json

from baton.common.errors import InvalidRequest
from router.json_limits import check_structure
from router.prompt_shape import check_prompt, check_token_ids
from router.reader.frames import Prompt, ReadBody

_MAX_FIELDS_BYTES: Final = 64 * 1024


def read_fields(body: bytes) -> dict[str, object]:
    """The JSON object that a body must be. Raises InvalidRequest."""
    check_structure(body)
    try:
        fields = from_json(body)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", None, "invalid_json") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object", None, "invalid_json")
    return fields


def take_prompt(fields: dict[str, object]) -> ReadBody:
    """Check the prompt, or the list of prompts, and take it out of the fields. Raises InvalidRequest."""
    prompt = _take(fields, "prompt")
    check_prompt(prompt)
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        prompts: list[Prompt] = list(prompt)
        return ReadBody(fields, prompts, single=False)
    assert isinstance(prompt, str | list)
    return ReadBody(fields, [prompt])


def take_tokens(fields: dict[str, object]) -> ReadBody:
    """The same for the token ids of /detokenize."""
    tokens = _take(fields, "tokens")
    check_token_ids(tokens, "tokens")
    assert isinstance(tokens, list)
    return ReadBody(fields, [tokens])


def _take(fields: dict[str, object], name: str) -> object:
    if name not in fields:
        raise InvalidRequest(f"{name} is required", name, "missing_required_parameter")
    return fields.pop(name)


def small_json(fields: Mapping[str, object]) -> bytes:
    """The fields besides the prompts. Raises InvalidRequest naming the largest if they are not small."""
    sizes = {name: len(to_json(value)) for name, value in fields.items()}
    if sum(sizes.values()) + sum(map(len, sizes)) > _MAX_FIELDS_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        message = (
            f"all fields but the prompt may take {_MAX_FIELDS_BYTES} bytes together; {largest[:64]} is the largest"
        )
        raise InvalidRequest(message, largest[:64], "body_too_large")
    return to_json(fields)
