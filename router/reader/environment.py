"""Chat templates compiled and rendered in jinja's sandbox, with what templates written for transformers expect.

Runs in the reader process only: nothing here bounds time or memory, process.py does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as loop_controls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.common.errors import InvalidRequest

_FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError)


class _Refusal(Exception):
    """The template itself refused the conversation, through its `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatEnvironment:
    """All templates of a model. `variables[name]` are the names that a template takes from outside.

    A template that does not compile is in `faults` with the reason, and not in `variables`.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, object], max_chars: int) -> None:
        self.variables: dict[str, frozenset[str]] = {}
        self.faults: dict[str, str] = {}
        self.tokens = tokens
        self._sources = sources
        self._max_chars = max_chars
        self._templates: dict[str, Template] = {}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loop_controls]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
                self.variables[name] = frozenset(meta.find_undeclared_variables(environment.parse(source)))
            except (TemplateError, ValueError, RecursionError, MemoryError) as error:
                self.faults[name] = f"{type(error).__name__}: {error}"

    def mentions(self, name: str, word: str) -> bool:
        return word in self._sources[name]

    def render(self, name: str, variables: Mapping[str, object]) -> str:
        """Raises InvalidRequest for whatever goes wrong in the template, also for what it refuses itself."""
        try:
            text = self._joined(self._templates[name].generate({**self.tokens, **variables}))
            text.encode()
        except _Refusal as refusal:
            raise InvalidRequest(str(refusal), "messages", "chat_template_refused") from None
        except MemoryError:
            raise InvalidRequest("the chat template took too much memory", "messages", "chat_template_failed") from None
        except _FAULTS as error:
            message = f"the chat template failed: {type(error).__name__}: {error}"
            raise InvalidRequest(message, "messages", "chat_template_failed") from None
        return text

    def _joined(self, pieces: Iterator[str]) -> str:
        text: list[str] = []
        room = self._max_chars
        for piece in pieces:
            room -= len(piece)
            if room < 0:
                message = f"the chat template made more than {self._max_chars} characters"
                raise InvalidRequest(message, "messages", "chat_template_failed")
            text.append(piece)
        return "".join(text)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
