"""The part of a chat request that becomes its prompt: messages and everything else that the chat template sees.

Read where the template runs, by reader/chat.py; the rest of the body is chat_request.py's.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation

from router.schema_errors import validated

MAX_MESSAGES: Final = 4096

ToolChoice = Literal["none", "auto", "required"]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ToolFunction(BaseModel):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: ToolFunction


class Message(BaseModel):
    """For the OpenAPI document: reader/messages.py checks by hand. Further fields are passed to the template."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ChatInput(BaseModel):
    """`chat_template` is the name of one of the model's own templates."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    messages: SkipValidation[Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


def take_chat(fields: dict[str, Any]) -> ChatInput:
    """Take these fields out of a body and check them, but for the messages. Raises InvalidRequest."""
    mine = {name: fields.pop(name) for name in ChatInput.model_fields if name in fields}
    chat, _ = validated(ChatInput, mine)
    return chat
