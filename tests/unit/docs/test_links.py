"""Every link resolves, and every file, module and make target that a page names exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.unit.docs.pages import REPOSITORY, anchors, command_lines, links, pages, spans

FOLDERS = sorted(entry.name for entry in REPOSITORY.iterdir() if entry.is_dir() and entry.name.isidentifier())
PATH = re.compile(rf"^(?:{'|'.join(FOLDERS)})/[\w./*{{}},-]*$")
IGNORED = re.compile(r"\.\.\.|[{}]|^deploy/overlays/\*")
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)


@pytest.mark.parametrize("page", pages(), ids=str)
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        file, _, anchor = target.partition("#")
        other = (REPOSITORY / page).parent / file if file else REPOSITORY / page
        assert other.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(other.relative_to(REPOSITORY)), f"{page}: {target}"


@pytest.mark.parametrize("page", pages(), ids=str)
def test_files_that_are_named_exist(page: Path) -> None:
    named = [word.rstrip(",.;:") for span in spans(page) for word in span.split()]
    named += [word for line in command_lines(page) for word in line.split()]
    for name in named:
        if PATH.match(name) and not IGNORED.search(name):
            assert any(REPOSITORY.glob(name.rstrip("/"))), f"{page}: {name}"


@pytest.mark.parametrize("page", pages(), ids=str)
def test_modules_and_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(TARGET.findall((REPOSITORY / "Makefile").read_text(encoding="utf-8")))
    for line in [*spans(page), *command_lines(page)]:
        for module in re.findall(r"python3? -m ([\w.]+)", line):
            assert importlib.util.find_spec(module) is not None, f"{page}: {module}"
        if made := re.match(r"make ([a-z-]+)$", line):
            assert made[1] in targets, f"{page}: {line}"
