"""A chat request to its prompt: which template, with which variables. Runs in the reader process.

What a template would silently leave out is refused by name.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final

from baton.common.errors import InvalidRequest
from router.chat_schema import ChatInput
from router.chat_templates import DEFAULT
from router.reader.environment import ChatEnvironment
from router.reader.messages import PlainMessage, plain_messages

_TOOL_USE: Final = "tool_use"
_OURS: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


def render_chat(chat: ChatInput, environment: ChatEnvironment) -> str:
    """The prompt. Raises InvalidRequest."""
    name = _template(chat, environment)
    messages = plain_messages(chat.messages)
    if not environment.mentions(name, "developer"):
        messages = [_as_system(message) for message in messages]
    variables = _variables(chat, name, environment.variables[name], environment.tokens)
    if chat.continue_final_message:
        return _continued(environment, name, variables, messages)
    return environment.render(name, {**variables, "messages": messages})


def _template(chat: ChatInput, environment: ChatEnvironment) -> str:
    names = sorted({*environment.variables, *environment.faults})
    if not names:
        message = (
            "this model has no chat template: put a chat_template.jinja beside its tokenizer.json, or name a file with "
            "--chat-template, and start the server again; or send the prompt as text to /v1/completions"
        )
        raise InvalidRequest(message, "messages", "no_chat_template")
    if chat.chat_template is not None and chat.chat_template not in names:
        message = f"chat_template must be the name of one of the model's own templates: {', '.join(names)}"
        raise InvalidRequest(message, "chat_template")
    preferred = [chat.chat_template, _TOOL_USE if chat.tools else None, DEFAULT, names[0] if len(names) == 1 else None]
    name = next((one for one in preferred if one in names), None)
    if name is None:
        message = f"the model has several chat templates and none is the default: name one of {', '.join(names)}"
        raise InvalidRequest(message, "chat_template")
    if name in environment.faults:
        message = f"chat template {name} of the model cannot be used: {environment.faults[name]}"
        raise InvalidRequest(message, "messages", "chat_template_failed")
    return name


def _variables(chat: ChatInput, name: str, used: frozenset[str], tokens: Mapping[str, object]) -> dict[str, Any]:
    """Everything but the messages."""
    if chat.tools and chat.tool_choice != "none":
        message = "tool calls are not read from the output; with tool_choice none the template is given the tools"
        raise InvalidRequest(message, "tools", "unsupported_parameter")
    if chat.tool_choice not in (None, "none", "auto"):
        raise InvalidRequest("tool_choice may only be none", "tool_choice", "unsupported_parameter")
    if chat.continue_final_message and chat.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt exclude each other"
        raise InvalidRequest(message, "continue_final_message")
    extra = dict(chat.chat_template_kwargs or {})
    if taken := sorted(set(extra) & {*_OURS, *tokens}):
        raise InvalidRequest(f"chat_template_kwargs may not set {taken[0]}", "chat_template_kwargs")
    if chat.reasoning_effort is not None:
        extra["reasoning_effort"] = chat.reasoning_effort
    optional = {"tools": chat.tools or None, "documents": chat.documents or None}
    for variable, value in {**extra, **optional}.items():
        if value is not None and variable not in used:
            param = variable if variable in ChatInput.model_fields else "chat_template_kwargs"
            message = f"chat template {name} of this model does not use {variable[:64]}"
            raise InvalidRequest(message, param, "unsupported_parameter")
    generation_prompt = not chat.continue_final_message and chat.add_generation_prompt is not False
    return {**extra, **optional, "add_generation_prompt": generation_prompt}


def _continued(
    environment: ChatEnvironment, name: str, variables: Mapping[str, Any], messages: list[PlainMessage]
) -> str:
    """The prompt ends with the text of the last message: a mark behind it shows where that is.

    A template that strips messages strips the end of this one too.
    """
    mark = secrets.token_hex(16)
    final = {**messages[-1], "content": messages[-1]["content"] + mark + " "}
    text = environment.render(name, {**variables, "messages": [*messages[:-1], final]})
    before, found, after = text.rpartition(mark)
    if not found:
        message = "the chat template leaves out the last message, so it cannot be continued"
        raise InvalidRequest(message, "continue_final_message")
    return before if after.startswith(" ") else before.rstrip()


def _as_system(message: PlainMessage) -> PlainMessage:
    """Templates older than the role would leave such messages out."""
    return {**message, "role": "system"} if message["role"] == "developer" else message
