"""How many log-probabilities a request may ask for: all are kept until the answer is out. Pure; used by submitter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from baton.common.errors import InvalidRequest

MAX_REPORTED: Final = 2**21


def check_reports(
    prompt_lengths: Sequence[int],
    max_tokens: Sequence[int],
    num_choices: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> None:
    """Lengths in tokens, one per prompt. Raises InvalidRequest naming the field that asks for too many."""
    outputs = 0 if logprobs is None else sum(max_tokens) * num_choices * (1 + logprobs)
    prompts = 0 if prompt_logprobs is None else sum(prompt_lengths) * num_choices * (1 + prompt_logprobs)
    if outputs + prompts > MAX_REPORTED:
        message = (
            f"{outputs + prompts} log-probabilities would be reported (tokens of all choices, and of the prompts where "
            f"they are wanted, times one and the number of likeliest); this server's limit is {MAX_REPORTED}"
        )
        raise InvalidRequest(message, "logprobs" if logprobs is not None else "prompt_logprobs")
