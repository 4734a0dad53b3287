"""The Markdown pages of the repository: their prose, blocks and links. Shared by the tests of this folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
_FENCE = re.compile(r"^( *)```[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"^ {4}(\S.*)$", re.MULTILINE)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_HIDDEN = re.compile(r"^\.|^build$|egg-info$")


def pages() -> list[Path]:
    """All pages, relative to the repository, but those of environments and builds."""
    folders = [entry for entry in sorted(REPOSITORY.iterdir()) if entry.is_dir() and not _HIDDEN.search(entry.name)]
    found = [*REPOSITORY.glob("*.md"), *(page for folder in folders for page in sorted(folder.rglob("*.md")))]
    return [page.relative_to(REPOSITORY) for page in found]


def text_of(page: Path) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    return _FENCE.sub("", text_of(page))


def spans(page: Path) -> list[str]:
    """What stands between backticks, lines joined."""
    return [" ".join(span.split()) for span in _SPAN.findall(prose_of(page))]


def links(page: Path) -> list[str]:
    """Targets of links and images that are not on another site."""
    return [target for target in _LINK.findall(prose_of(page)) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """What headings are called in a link."""
    headings = _HEADING.findall(prose_of(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def command_lines(page: Path) -> Iterator[str]:
    """Lines of blocks, comments taken off and continued lines joined."""
    blocks = [body for _, body in _FENCE.findall(text_of(page))] + _INDENTED.findall(prose_of(page))
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"(^|\s)#.*$", "", line).strip()
