"""What a check says, and how a check that goes wrong itself is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """WRONG has to be changed before serving; NOTE may cost speed; SKIPPED could not be looked at here."""

    OK = "ok"
    NOTE = "note"
    SKIPPED = "skipped"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `change` says what to do where something is not as it should be."""

    check: str
    status: Status
    text: str
    change: str = ""


Check = Callable[[], Sequence[Finding]]


def ok(check: str, text: str) -> Finding:
    return Finding(check, Status.OK, text)


def note(check: str, text: str, change: str = "") -> Finding:
    return Finding(check, Status.NOTE, text, change)


def skipped(check: str, text: str) -> Finding:
    return Finding(check, Status.SKIPPED, text)


def wrong(check: str, text: str, change: str) -> Finding:
    return Finding(check, Status.WRONG, text, change)


def run_check(name: str, check: Check) -> list[Finding]:
    """The check's findings; one that raises is a finding too, so that the others are still made."""
    try:
        return list(check())
    except Exception as error:  # noqa: BLE001 (a doctor that dies of a symptom helps nobody)
        return [wrong(name, f"could not be checked: {type(error).__name__}: {error}", "report this with its output")]
