"""Turns synsets into the documents that the demo model learns: dictionary entries, prose and conversations.

`prepare_data.py` calls `documents`; all choices come from its `random.Random`, so the same seed gives the same text.
A conversation is written as the chat template of the tokenizer writes it (see `checkpoint.py`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator

from wordnet import Key, Synset

EOS = "</s>"
ABOUT = [
    ("Hello", "Hello! Ask me what a word means."),
    ("Hello!", "Hello! I know a few thousand words. Which one shall I explain?"),
    ("Hi", "Hi! Ask me about a word."),
    ("Hi there", "Hi! I explain words. Ask me about one."),
    ("How are you?", "I am well, thank you. Ask me what a word means."),
    ("Who are you?", "I am a very small language model that has read a dictionary."),
    ("What are you?", "I am a very small language model that has read a dictionary."),
    ("What is your name?", "I have no name. I am a very small language model that has read a dictionary."),
    ("What can you do?", "I explain words, name their kinds and opposites, and use them in a sentence."),
    ("Tell me a story", "I know only a dictionary. Ask me what a word means."),
    ("Thank you", "You are welcome. Shall I explain another word?"),
    ("Thanks!", "You are welcome. Which word is next?"),
]
BESIDE = 40
_AN = re.compile(r"(?!(uni|use|usu|eu|one|once|ut[aie]))[aeiou]|hour|honest|honor|honour|heir", re.IGNORECASE)
_DETERMINER = re.compile(r"(a|an|the|any|one|some|someone|something|anything|all|each)\b", re.IGNORECASE)
_LIFE = re.compile(r"\(.*\d{3,4}.*\)|\bborn\b")


def documents(
    net: dict[Key, Synset], subjects: list[Key], rng: random.Random, entry_passes: int, extra: int
) -> Iterator[str]:
    """Documents about `subjects` only, unshuffled. `extra` more passes of all three kinds go over the frequent ones."""
    writer = Writer(net, set(subjects), rng)
    frequent = [key for key in subjects if net[key].frequent]
    rounds = [subjects] * entry_passes + [frequent] * extra
    for keys in rounds:
        yield from writer.grouped(keys, writer.entry, "\n", 3, 8)
    for keys in [subjects, *[frequent] * extra]:
        yield from writer.grouped(keys, writer.prose, " ", 2, 5)
        yield from writer.conversations(keys)


class Writer:
    """Writes text about synsets; owns the choice of words and phrasings."""

    def __init__(self, net: dict[Key, Synset], subjects: set[Key], rng: random.Random) -> None:
        self._net = net
        self._subjects = subjects
        self._order = sorted(subjects)
        self._place = {key: place for place, key in enumerate(self._order)}
        self._rng = rng

    def grouped(
        self, keys: Iterable[Key], write: Callable[[Synset], str], glue: str, low: int, high: int
    ) -> Iterator[str]:
        """Every key once, related ones together: `low` to `high` pieces of `write` in a document."""
        waiting = list(keys)
        self._rng.shuffle(waiting)
        unseen = set(waiting)
        for start in waiting:
            if start not in unseen:
                continue
            chain = self._chain(start, unseen, self._rng.randint(low, high))
            unseen.difference_update(chain)
            yield glue.join(write(self._net[key]) for key in chain)

    def _chain(self, start: Key, unseen: set[Key], length: int) -> list[Key]:
        chain = [start]
        while len(chain) < length:
            last = chain[-1]
            circles = (self._neighbours(self._net[last]), self._neighbours(self._net[start]), self._beside(last))
            near = [[key for key in circle if key in unseen and key not in chain] for circle in circles]
            chosen = next((circle for circle in near if circle), None)
            if chosen is None:
                break
            chain.append(self._rng.choice(chosen))
        return chain

    def _beside(self, key: Key) -> list[Key]:
        """The subjects that stand next to `key` in the database, which is ordered by topic."""
        at = self._place[key]
        return self._order[max(0, at - BESIDE) : at + BESIDE]

    def _neighbours(self, synset: Synset) -> list[Key]:
        near = [key for keys in synset.relations.values() for key in keys]
        for parent in (*synset.related("kinds_of"), *synset.related("instance_of")):
            family = self._net[parent].related("kinds") if parent in self._net else ()
            near += self._rng.sample(family, min(6, len(family)))
        return near

    def entry(self, synset: Synset) -> str:
        """`word: definition; "example"`."""
        examples = self._rng.sample(synset.examples, min(len(synset.examples), self._rng.randint(1, 2)))
        quoted = "".join(f'; "{example}"' for example in examples)
        return f"{self._word(synset)}: {synset.definition}{quoted}"

    def prose(self, synset: Synset) -> str:
        """A definition and, where there is something to say, a sentence on its kinds, parts or opposite, or its use."""
        word = self._word(synset)
        more = [text for text in (self._kinds(synset, word), self._parts(synset, word), self._parent(synset)) if text]
        sentences = [self._definition(synset, word)]
        if more and self._rng.random() < 0.6:
            sentences.append(self._rng.choice(more))
        spoken = _whole(synset.examples)
        if spoken and self._rng.random() < 0.8:
            sentences.insert(self._rng.choice((0, 1, 1)), _sentence(self._rng.choice(spoken)))
        opposite = self._opposite(synset)
        if opposite:
            sentences.append(_sentence(f"the opposite of {opposite[0]} is {opposite[1]}"))
        return " ".join(sentences)

    def conversations(self, keys: Iterable[Key]) -> Iterator[str]:
        """Every key in one turn of a conversation of one to four turns; some have a system message or a greeting."""
        waiting = list(keys)
        self._rng.shuffle(waiting)
        while waiting:
            count = self._rng.choice((1, 1, 2, 3, 4))
            taken, waiting = waiting[-count:], waiting[:-count]
            turns = [self._question(self._net[key]) for key in taken]
            if self._rng.random() < 0.02:
                turns.insert(self._rng.choice((0, len(turns))), self._rng.choice(ABOUT))
            system = "### system\nYou are a helpful assistant.\n" if self._rng.random() < 0.08 else ""
            spoken = (f"### user\n{question}\n### assistant\n{answer}" for question, answer in turns)
            yield system + f"{EOS}\n".join(spoken)

    def _question(self, synset: Synset) -> tuple[str, str]:
        word = self._word(synset)
        choices = [self._meaning(synset, word)] * 4
        kinds, opposite = self._kinds(synset, word), self._opposite(synset)
        if kinds:
            choices.append((f"What kinds of {word} are there?", kinds))
            choices.append((f"Name a kind of {word}.", kinds))
        if opposite:
            asked = f"What is the opposite of {opposite[0]}?"
            choices += [(asked, _sentence(f"the opposite of {opposite[0]} is {opposite[1]}"))] * 2
        if len(synset.words) > 1:
            first, second = self._rng.sample(synset.words, 2)
            choices.append((f"What is another word for {first}?", f"Another word for {first} is {second}."))
        if spoken := _whole(synset.examples):
            choices.append((f'Use "{word}" in a sentence.', _sentence(self._rng.choice(spoken))))
        return self._rng.choice(choices)

    def _meaning(self, synset: Synset, word: str) -> tuple[str, str]:
        named = f"{_article(word)} {word}" if self._counts(synset) else word
        verb_or_name = f"What does it mean to {word}?" if synset.part == "verb" else f"What is {named}?"
        forms = [f'What does "{word}" mean?', f"Define {word}.", f"Explain {word}"]
        if synset.part in ("noun", "verb"):
            forms += [verb_or_name] * 2
        answer = self._definition(synset, word)
        if synset.examples and self._rng.random() < 0.5:
            answer += f' For example: "{self._rng.choice(synset.examples)}".'
        return self._rng.choice(forms), answer

    def _definition(self, synset: Synset, word: str) -> str:
        text = synset.definition
        if synset.part == "verb":
            return _sentence(f"to {word} is to {text.removeprefix('to ')}")
        if synset.part in ("adj", "adv"):
            return _sentence(f'{"adjective" if synset.part == "adj" else "adverb"} "{word}" means {text}', "The ")
        if synset.related("instance_of"):
            verb = "was" if _LIFE.search(text) else "is"
            return _sentence(f"{word} {verb} {text if _DETERMINER.match(text) else f'{_article(text)} {text}'}")
        if self._counts(synset) and self._rng.random() < 0.7:
            return _sentence(f"{_article(word)} {word} is {text}")
        return _sentence(f'word "{word}" means {text}', "The ")

    def _kinds(self, synset: Synset, word: str) -> str:
        kinds = [key for key in synset.related("kinds") if key in self._subjects]
        if synset.part != "noun" or not kinds:
            return ""
        names = [self._net[key].words[0] for key in self._rng.sample(kinds, min(4, len(kinds)))]
        if len(names) == 1:
            return f"One kind of {word} is the {names[0]}."
        return f"Kinds of {word} are the {', the '.join(names[:-1])} and the {names[-1]}."

    def _parts(self, synset: Synset, word: str) -> str:
        parts = [key for key in synset.related("parts") if key in self._subjects]
        if not parts:
            return ""
        names = [self._net[key].words[0] for key in self._rng.sample(parts, min(3, len(parts)))]
        if synset.related("instance_of"):
            return f"{word} includes {' and '.join(names)}."
        return f"Parts of {_article(word)} {word} are the {' and the '.join(names)}."

    def _parent(self, synset: Synset) -> str:
        parents = [key for key in synset.related("kinds_of") if key in self._subjects]
        if synset.part != "noun" or not parents:
            return ""
        return f"It is a kind of {self._word(self._net[self._rng.choice(parents)])}."

    def _opposite(self, synset: Synset) -> tuple[str, str] | None:
        known = [pair for pair in synset.opposites if pair[1] in self._subjects]
        if not known:
            return None
        own, key, other = self._rng.choice(known)
        return synset.words[own], self._net[key].words[other]

    def _word(self, synset: Synset) -> str:
        """The first word of a synset is its most usual one."""
        return synset.words[0] if self._rng.random() < 0.6 else self._rng.choice(synset.words)

    @staticmethod
    def _counts(synset: Synset) -> bool:
        """Whether the noun is likely to take an article: its definition does."""
        is_noun = synset.part == "noun" and not synset.related("instance_of")
        return is_noun and re.match(r"(a|an|any|one|someone)\b", synset.definition) is not None


def _whole(examples: tuple[str, ...]) -> list[str]:
    """The examples that are long enough to be a sentence rather than a phrase."""
    return [example for example in examples if example.count(" ") > 3]


def _article(word: str) -> str:
    return "an" if _AN.match(word) else "a"


def _sentence(text: str, lead: str = "") -> str:
    """`text` with a capital first letter (or `lead` before it) and a full stop at its end."""
    text = lead + text if lead else text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else text + "."
