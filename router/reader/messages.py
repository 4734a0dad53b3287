"""Messages as clients send them to messages as templates expect them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from baton.common.errors import InvalidRequest
from router.chat_schema import MAX_MESSAGES

_TEXT_PARTS = {"text": "text", "input_text": "text", "refusal": "refusal"}

PlainMessage = dict[str, Any]


def plain_messages(messages: object) -> list[PlainMessage]:
    """Checked copies whose content is text and whose tool calls have arguments as objects. Raises InvalidRequest."""
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"messages must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain(message: object, where: str) -> PlainMessage:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object", "messages")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise InvalidRequest(f"{where}.role must be text", "messages")
    plain = {name: value for name, value in message.items() if value is not None}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(plain.get(name, ""), str):
            raise InvalidRequest(f"{where}.{name} must be text", "messages")
    if plain.get("audio") or plain.get("function_call"):
        raise InvalidRequest(f"{where}: audio and function_call are not supported", "messages", "unsupported_parameter")
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{where}.tool_calls")
    elif "content" not in plain and message["role"] != "assistant":
        raise InvalidRequest(f"{where}.content is required", "messages")
    plain["content"] = _text(plain.get("content", ""), f"{where}.content")
    return plain


def _text(content: object, where: str) -> str:
    """Parts are joined by line breaks. Anything but text is refused by its name."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be text or a list of parts", "messages")
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidRequest(f"{where} must be an object with a type", "messages")
    field = _TEXT_PARTS.get(part["type"])
    if field is None:
        message = f"{where}: parts of type {part['type'][:64]} are not supported; this server reads text"
        raise InvalidRequest(message, "messages", "unsupported_parameter")
    if not isinstance(part.get(field), str):
        raise InvalidRequest(f"{where}.{field} must be text", "messages")
    return str(part[field])


def _tool_calls(calls: object, where: str) -> list[PlainMessage]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where} must be a list", "messages")
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> PlainMessage:
    """Clients send the arguments as JSON in text, templates print them as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where} must be an object with a function and its name", "messages")
    if not isinstance(call.get("id"), str | None):
        raise InvalidRequest(f"{where}.id must be text", "messages")
    if call.get("type", "function") != "function":
        raise InvalidRequest(f"{where}.type must be function", "messages")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = from_json(arguments)
        except ValueError as error:
            raise InvalidRequest(f"{where}.function.arguments is not valid JSON: {error}", "messages") from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{where}.function.arguments must be an object", "messages")
    return {**call, "function": {**function, "arguments": arguments}}
