"""Log-probabilities in the form of /v1/completions: four parallel lists. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from baton.common.sampling import TokenLogprobs
from router.text import TextDelta

NameOf = Callable[[int], str]
Entries = dict[str, dict[str, object]]


def name_by_id(token_id: int) -> str:
    """For clients that want ids, which unlike texts are unique."""
    return f"token_id:{token_id}"


@dataclass(slots=True)
class LogprobLists:
    """One entry per token. A prompt's first token has none, nothing comes before it."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add_first(self, token_id: int, name: NameOf) -> None:
        self.tokens.append(name(token_id))
        self.token_logprobs.append(None)
        self.top_logprobs.append(None)
        self.text_offset.append(0)

    def add(self, known: Iterable[TokenLogprobs], offsets: Iterable[int], num_top: int, name: NameOf) -> None:
        for token, offset in zip(known, offsets, strict=True):
            self.tokens.append(name(token.token_id))
            self.token_logprobs.append(token.logprob)
            self.top_logprobs.append(_top(token, num_top, name))
            self.text_offset.append(offset)

    def as_dict(self) -> dict[str, object]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


def output_logprobs(delta: TextDelta, start: int, num_top: int, name: NameOf) -> LogprobLists:
    """Of a delta's tokens; the output's text begins at character `start`."""
    lists = LogprobLists()
    lists.add(delta.logprobs, [start + offset for offset in delta.offsets], num_top, name)
    return lists


def prompt_logprobs(
    token_ids: Sequence[int], known: Iterable[TokenLogprobs], offsets: Sequence[int], num_top: int, name: NameOf
) -> LogprobLists:
    """Of a whole prompt; `known` lacks the first token."""
    lists = LogprobLists()
    lists.add_first(token_ids[0], name)
    lists.add(known, offsets[1:], num_top, name)
    return lists


def joined(first: LogprobLists | None, rest: LogprobLists) -> LogprobLists:
    """A prompt's lists, if they are to be shown, and those of an output."""
    if first is None:
        return rest
    return LogprobLists(
        first.tokens + rest.tokens,
        first.token_logprobs + rest.token_logprobs,
        first.top_logprobs + rest.top_logprobs,
        first.text_offset + rest.text_offset,
    )


def by_id(known: Iterable[TokenLogprobs], num_top: int, text: NameOf) -> list[Entries | None]:
    """The form of `prompt_logprobs`: for each token of the prompt the likeliest ones and itself, by id."""
    return [None, *(_entries(token, num_top, text) for token in known)]


def _top(token: TokenLogprobs, num_top: int, name: NameOf) -> dict[str, float]:
    """The likeliest and the token itself. Of tokens with one text (parts of characters) the likeliest counts."""
    top: dict[str, float] = {}
    for token_id, logprob in (*token.top[:num_top], (token.token_id, token.logprob)):
        top.setdefault(name(token_id), logprob)
    return top


def _entries(token: TokenLogprobs, num_top: int, text: NameOf) -> Entries:
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(token.top[:num_top], 1)]
    ranked.append((token.token_id, token.logprob, token.rank))
    return {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": text(token_id)}
        for token_id, logprob, rank in ranked
    }
