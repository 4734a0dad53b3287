"""Reads the WordNet 3.0 database files (data.*, index.*) into synsets.

Owned by the demo model's data preparation; `prepare_data.py` calls `load`, `documents.py` reads the result.
The file format is the one of the manual page wndb(5WN).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

Key = tuple[str, int]  # file ("noun", "verb", "adj", "adv") and byte offset in it

PARTS = ("noun", "verb", "adj", "adv")
_PART_OF_LETTER = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
_RELATIONS = {"@": "kinds_of", "@i": "instance_of", "~": "kinds", "~i": "instances", "%p": "parts", "&": "similar"}
_QUOTED = re.compile(r'"([^"]+)"')
_MARKER = re.compile(r"\((?:a|p|ip)\)$")


@dataclass(frozen=True)
class Synset:
    """One meaning: the words that share it, its definition, sentences that show it, and keys of related meanings."""

    key: Key
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    relations: dict[str, tuple[Key, ...]]
    opposites: tuple[tuple[int, Key, int], ...]  # own word's index, the other synset, its word's index
    frequent: bool  # met in the texts that WordNet's authors annotated

    @property
    def part(self) -> str:
        return self.key[0]

    def related(self, kind: str) -> tuple[Key, ...]:
        return self.relations.get(kind, ())


def load(folder: Path) -> dict[Key, Synset]:
    """All synsets of the database in `folder` that have a definition, in file order."""
    frequent = {key for part in PARTS for key in _annotated(folder / f"index.{part}", part)}
    lines = ((part, line) for part in PARTS for line in _lines(folder / f"data.{part}"))
    synsets = (_synset(part, line, frequent) for part, line in lines)
    return {synset.key: synset for synset in synsets if synset.definition}


def _lines(file: Path) -> list[str]:
    """The records of a database file: its licence notice is indented by two blanks."""
    return [line for line in file.read_text(encoding="latin-1").splitlines() if line and not line.startswith("  ")]


def _annotated(file: Path, part: str) -> set[Key]:
    """Keys of the senses that were met in the annotated texts: the first `tagsense_cnt` offsets of each lemma."""
    found: set[Key] = set()
    for line in _lines(file):
        fields = line.split()
        count, pointers = int(fields[2]), int(fields[3])
        annotated = int(fields[5 + pointers])
        found.update((part, int(offset)) for offset in fields[-count:][:annotated])
    return found


def _synset(part: str, line: str, frequent: set[Key]) -> Synset:
    record, _, gloss = line.partition(" | ")
    fields = record.split()
    key = (part, int(fields[0]))
    num_words = int(fields[3], 16)
    words = tuple(_MARKER.sub("", word).replace("_", " ") for word in fields[4 : 4 + 2 * num_words : 2])
    relations, opposites = _pointers(fields[4 + 2 * num_words :])
    definition, examples = _split_gloss(gloss)
    return Synset(key, words, definition, examples, relations, opposites, key in frequent)


def _pointers(fields: list[str]) -> tuple[dict[str, tuple[Key, ...]], tuple[tuple[int, Key, int], ...]]:
    relations: dict[str, tuple[Key, ...]] = {}
    opposites: list[tuple[int, Key, int]] = []
    for index in range(int(fields[0])):
        symbol, offset, letter, ends = fields[1 + 4 * index : 5 + 4 * index]
        key = (_PART_OF_LETTER[letter], int(offset))
        if symbol == "!":
            opposites.append((int(ends[:2], 16) - 1, key, int(ends[2:], 16) - 1))
        elif symbol in _RELATIONS:
            kind = _RELATIONS[symbol]
            relations[kind] = (*relations.get(kind, ()), key)
    return relations, tuple(opposites)


def _split_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    """The definition and the quoted sentences of a gloss."""
    gloss = " ".join(gloss.split())
    examples = tuple(quoted.strip(" ;,.") for quoted in _QUOTED.findall(gloss))
    definition = gloss.split('"', 1)[0].strip(" ;:,.-")
    return definition, tuple(example for example in examples if len(example) > 3)
