"""The answers of /v1/completions: the whole completion, and the chunks of a stream. Pure."""

from __future__ import annotations

import time
from dataclasses import asdict

from router.completions import Choice, Usage, group_id, total_usage
from router.text import TextDelta


class CompletionHead:
    """What every object of one answer repeats."""

    def __init__(self, choices: list[Choice], model: str) -> None:
        self._head = {
            "id": group_id(choices),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, choice: Choice, delta: TextDelta, with_ids: bool, with_usage: bool) -> dict[str, object]:
        """`with_usage`: the client asked for usage, so chunks before the last one carry a null."""
        content = {**self._head, "choices": [_choice(choice, delta, with_ids)]}
        return content | {"usage": None} if with_usage else content

    def usage_chunk(self, choices: list[Choice]) -> dict[str, object]:
        return {**self._head, "choices": [], "usage": _usage(total_usage(choices))}

    def completion(self, choices: list[Choice], deltas: list[list[TextDelta]], with_ids: bool) -> dict[str, object]:
        """`deltas[i]` are all deltas of `choices[i]`."""
        whole = [_joined(parts) for parts in deltas]
        return {
            **self._head,
            "choices": [_choice(choice, delta, with_ids) for choice, delta in zip(choices, whole, strict=True)],
            "usage": _usage(total_usage(choices)),
        }


def path_header(choices: list[Choice]) -> str:
    """The path and why, for `x-baton-path`; of several prompts each distinct one."""
    paths = list(dict.fromkeys(choice.path for choice in choices))
    return " ".join(" | ".join(paths).split()).encode("ascii", "replace").decode()


def _choice(choice: Choice, delta: TextDelta, with_ids: bool) -> dict[str, object]:
    content: dict[str, object] = {
        "index": choice.index,
        "text": delta.text,
        "logprobs": None,
        "finish_reason": delta.finish_reason,
    }
    return content | {"token_ids": delta.token_ids} if with_ids else content


def _joined(deltas: list[TextDelta]) -> TextDelta:
    text = "".join(delta.text for delta in deltas)
    token_ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
    return TextDelta(text, token_ids, deltas[-1].finish_reason if deltas else None)


def _usage(usage: Usage) -> dict[str, int]:
    return asdict(usage) | {"total_tokens": usage.total_tokens}
