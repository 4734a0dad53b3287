"""What a prompt may be, checked by hand because it may be large: text, token ids, or a list of either. Pure."""

from __future__ import annotations

from array import array
from typing import Final

from baton.common.errors import InvalidRequest

MAX_PROMPTS: Final = 128
MAX_PROMPT_TOKENS: Final = 2**20
MAX_IDS: Final = 2**17


def check_prompt(prompt: object, name: str = "prompt") -> None:
    """Raises InvalidRequest. An `array` of unsigned ints was checked when it was made."""
    if isinstance(prompt, str) or _are_token_ids(prompt):
        return
    if not isinstance(prompt, list) or not 0 < len(prompt) <= MAX_PROMPTS:
        good = False
    elif isinstance(prompt[0], str):
        good = all(isinstance(item, str) for item in prompt)
    else:
        good = all(map(_are_token_ids, prompt))
    if not good:
        message = f"{name} must be text, a non-empty list of token ids, or a list of 1 to {MAX_PROMPTS} of either"
        raise InvalidRequest(message, name)


def check_token_ids(ids: object, name: str) -> None:
    """The same where only ids will do, and not very many; none at all are allowed."""
    if ids != [] and not (_are_token_ids(ids) and isinstance(ids, list) and len(ids) <= MAX_IDS):
        raise InvalidRequest(f"{name} must be a list of up to {MAX_IDS} token ids", name)


def _are_token_ids(value: object) -> bool:
    """A bool is not an int here."""
    if isinstance(value, array):
        return 0 < len(value) <= MAX_PROMPT_TOKENS
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PROMPT_TOKENS:
        return False
    return set(map(type, value)) == {int} and min(value) >= 0 and max(value) < 2**32
