"""From the tokens of one output to the text that its client sees. Pure but for the tokenizer.

One assembler per output; used by choice.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.common.sampling import SamplingParams, TokenLogprobs
from router.detokenizer import Decoder, Detokenizer
from router.stop_strings import StopStrings
from router.types import TokenEvent


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New tokens and the text that they complete. `stopped`: a stop string ended the output within these tokens.

    `stop_reason`: the stop string or the stop token's id that ended it. `offsets`: for every token, how many characters
    of the output come before its own. `logprobs`: one per token, if asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stopped: bool = False
    stop_reason: str | int | None = None
    offsets: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


class TextAssembler:
    """The token that ends an output (an EOS or stop id) counts as a token and has no text, unless `include_stop`.

    Stop strings are looked for in the text of the tokens after the first `min_tokens` only.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        stop: Sequence[str],
        sampling: SamplingParams,
        *,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(decoder, prompt)
        self._stop = StopStrings(stop, included=include_stop)
        self._include_stop = include_stop
        self._stop_token_ids = sampling.stop_token_ids
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._num_chars = 0

    def push(self, event: TokenEvent) -> TextDelta:
        """Tokens after the one that completes a stop string are dropped."""
        pieces: list[str] = []
        offsets: list[int] = []
        end_token = self._end_token(event)
        last = len(event.token_ids) - 1
        for index, token_id in enumerate(event.token_ids):
            offsets.append(self._num_chars)
            if end_token is not None and index == last and not self._include_stop:
                break
            safe, stopped = self._add(self._detokenizer.push(token_id))
            pieces.append(safe)
            if stopped:
                return self._delta(event, pieces, offsets, "stop", self._stop.found)
        if event.finish_reason is None:
            return self._delta(event, pieces, offsets, None, None)
        safe, stopped = self._stop.push(self._detokenizer.flush())
        pieces.append(safe if stopped else safe + self._stop.flush())
        if stopped:
            return self._delta(event, pieces, offsets, "stop", self._stop.found)
        return self._delta(event, pieces, offsets, event.finish_reason, end_token)

    def _end_token(self, event: TokenEvent) -> int | None:
        """The stop token that ended the output, if one did: it is the event's last."""
        if event.finish_reason != "stop" or event.token_ids[-1:] == ():
            return None
        return event.token_ids[-1] if event.token_ids[-1] in self._stop_token_ids else None

    def _add(self, text: str) -> tuple[str, bool]:
        self._num_chars += len(text)
        self._num_tokens += 1
        return (text, False) if self._num_tokens <= self._min_tokens else self._stop.push(text)

    def _delta(
        self,
        event: TokenEvent,
        pieces: list[str],
        offsets: list[int],
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> TextDelta:
        num_tokens = len(offsets)
        return TextDelta(
            "".join(pieces),
            event.token_ids[:num_tokens],
            finish_reason,
            isinstance(stop_reason, str),
            stop_reason,
            tuple(offsets),
            event.logprobs[:num_tokens],
        )
