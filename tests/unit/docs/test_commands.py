"""Every `baton` command that a page shows is one, with its flags; every body that README sends is a request."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from baton.cli.main import app
from router.openai_schema import checked
from router.reader.messages import plain_messages
from tests.unit.docs.pages import command_lines, pages, spans

BATON = re.compile(r"^(?:\.venv/bin/)?baton (?P<arguments>.*)$")
COMMANDS = {line for page in pages() for line in [*spans(page), *command_lines(page)] if BATON.match(line)}
README = Path("README.md")


@pytest.mark.parametrize("line", sorted(COMMANDS))
def test_a_command_that_is_shown_can_be_called(line: str) -> None:
    """Up to what it would do: names and flags are known, and values have their types."""
    match = BATON.match(line)
    assert match is not None
    arguments = shlex.split(match["arguments"])
    command: Any = typer.main.get_command(app)  # click's own, or the one that typer brings
    context = command.context_class(command, info_name="baton")
    while hasattr(command, "resolve_command"):
        assert arguments, f"{line} lacks a command"
        name, command, arguments = command.resolve_command(context, arguments)
        context = command.context_class(command, parent=context, info_name=name)
    if arguments:
        command.make_context(context.info_name, arguments)


def bodies(path: str) -> list[dict[str, object]]:
    """Those that README's curl lines send to `path`."""
    lines = [shlex.split(line) for line in command_lines(README) if line.startswith("curl ") and path in line]
    return [json.loads(words[words.index("-d") + 1]) for words in lines]


def test_the_bodies_that_readme_sends_are_requests() -> None:
    (completion,) = bodies("/v1/completions")
    assert checked(completion).num_ignored_fields == 0
    (chat,) = bodies("/v1/chat/completions")
    assert plain_messages(chat["messages"])
    assert chat["model"] == completion["model"] == "demo_model"
