"""Token ids of one output to text, piece by piece, without ever emitting half a character.

Pure but for the tokenizer. One instance per output; used by text.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6  # prompt tokens decoded along, since some decoders treat the first token of a text in a special way
_LONGEST_WINDOW = 64
_MAX_BROKEN_TOKENS = 3  # a character of UTF-8 has four bytes: what is incomplete after that many more tokens stays so


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Decodes a short window of tokens at a time.

    The window is `ids`: those before `_read` give text that is out already and serve as context, those after it do not
    yet end in a whole character. `_shown` counts the window's characters that are out.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int]) -> None:
        self._decoder = decoder
        self._ids: deque[int] = deque(prompt[-_CONTEXT:])
        self._read = len(self._ids)
        self._prompt_text = decoder.decode(list(self._ids))
        self._shown = len(self._prompt_text.rstrip(_BROKEN))
        self._broken_tokens = 0

    def push(self, token_id: int) -> str:
        """Text that is complete with this token; empty while a character is incomplete."""
        self._ids.append(token_id)
        window = self._decoder.decode(list(self._ids))
        if self._prompt_text:
            self._leave_prompt(window)
        if not window.endswith(_BROKEN):
            return self._take_all(window)
        stable = window.rstrip(_BROKEN)
        if len(stable) > self._shown:
            self._broken_tokens = 0
            text, self._shown = stable[self._shown :], len(stable)
            return text
        self._broken_tokens += 1
        return self._give_up(window) if self._broken_tokens > _MAX_BROKEN_TOKENS else ""

    def flush(self) -> str:
        """What is held back, at the end of the output: bytes that no later token can complete any more."""
        window = self._decoder.decode(list(self._ids))
        text, self._shown = window[self._shown :], len(window)
        return text

    def _leave_prompt(self, window: str) -> None:
        """A prompt may end amid a character. What is broken there is the prompt's, unless the output completes it."""
        if not window.startswith(self._prompt_text):
            self._prompt_text = ""
        elif len(window) > len(self._prompt_text):
            self._shown = len(self._prompt_text)
            self._prompt_text = ""

    def _take_all(self, window: str) -> str:
        """Emit the rest of the window; its last tokens become the context of the next one."""
        text = window[self._shown :]
        self._keep(len(self._ids) - self._read)
        self._read = len(self._ids)
        self._shown = len(self._decoder.decode(list(self._ids)))
        self._broken_tokens = 0
        return text

    def _give_up(self, window: str) -> str:
        """Bytes that can no longer become a character come out as they are; only the last may still be half one."""
        text, self._shown = window[self._shown : -1], max(self._shown, len(window) - 1)
        if len(self._ids) > _LONGEST_WINDOW:
            self._keep(_CONTEXT)
            self._read, self._shown = 0, max(len(self._decoder.decode(list(self._ids))) - 1, 0)
        return text

    def _keep(self, num_tokens: int) -> None:
        while len(self._ids) > num_tokens:
            self._ids.popleft()
