"""From the tokens of one output to the text that its client sees. Pure but for the tokenizer.

One assembler per output; used by completions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.detokenizer import Decoder, Detokenizer
from router.stop_strings import StopStrings
from router.types import TokenEvent


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New tokens and the text that they complete. `stopped`: a stop string ended the output within these tokens."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stopped: bool = False


class TextAssembler:
    """The token that ends an output (an EOS id) counts as a token and has no text."""

    def __init__(
        self, decoder: Decoder, prompt: Sequence[int], stop: Sequence[str], stop_token_ids: frozenset[int]
    ) -> None:
        self._detokenizer = Detokenizer(decoder, prompt)
        self._stop = StopStrings(stop)
        self._stop_token_ids = stop_token_ids

    def push(self, event: TokenEvent) -> TextDelta:
        """Tokens after the one that completes a stop string are dropped."""
        pieces: list[str] = []
        ended_by_token = event.finish_reason == "stop" and event.token_ids[-1:] != ()
        last = len(event.token_ids) - 1
        for index, token_id in enumerate(event.token_ids):
            if ended_by_token and index == last and token_id in self._stop_token_ids:
                break
            safe, stopped = self._stop.push(self._detokenizer.push(token_id))
            pieces.append(safe)
            if stopped:
                return TextDelta("".join(pieces), event.token_ids[: index + 1], "stop", stopped=True)
        if event.finish_reason is None:
            return TextDelta("".join(pieces), event.token_ids, None)
        safe, stopped = self._stop.push(self._detokenizer.flush())
        pieces.append(safe if stopped else safe + self._stop.flush())
        return TextDelta("".join(pieces), event.token_ids, "stop" if stopped else event.finish_reason, stopped)
