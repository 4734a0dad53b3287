"""The judgement of a chaos run: every stream against the model, its text, its log-probabilities and its usage (I7)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from baton.chaos.load import Stream
from baton.chaos.reference import Reference, Spoken, Verdict
from baton.chaos.result import Result

MAX_LOGPROB_ERROR = 1e-3
_PROGRESS_S = 10.0


class Judge:
    """`reference` knows the model. Text is compared where the model's directory has a tokenizer."""

    def __init__(self, model: Path, reference: Reference) -> None:
        file = model / "tokenizer.json"
        self._tokenizer: Tokenizer | None = Tokenizer.from_file(str(file)) if file.is_file() else None
        self._reference = reference

    def judge(self, result: Result, announce: Callable[[str], None]) -> None:
        """Fill in what was lost and what was wrong, by the index of the stream. Says now and then how far it is."""
        spoken: dict[int, Spoken] = {}
        for index, stream in enumerate(result.streams):
            if stream.error:
                result.lost[index] = f"{stream.request_id or 'unnamed'}: {stream.error}"
            if stream.token_ids:
                job = stream.job
                spoken[index] = Spoken(job.prompt, stream.token_ids, job.temperature, job.seed, stream.logprobs)
            if not stream.error and (problem := self._misreported(stream)):
                result.wrong[index] = f"{stream.request_id}: {problem}"
        indices, said_at = list(spoken), time.monotonic()
        for done, (place, verdict) in enumerate(self._reference.judge_all(list(spoken.values())), 1):
            _note(result, indices[place], verdict)
            if time.monotonic() > said_at + _PROGRESS_S:
                said_at = time.monotonic()
                announce(f"judged {done} of {len(spoken)}")

    def _misreported(self, stream: Stream) -> str:
        if stream.cancelled:
            return ""
        problem = _miscounted(stream) or _misfinished(stream)
        return problem or ("" if self._tokenizer is None else mistyped(stream, self._tokenizer))


def mistyped(stream: Stream, tokenizer: Tokenizer) -> str:
    """What is wrong with a stream's text: it is that of its tokens up to the first stop string, and no token follows.

    Only ASCII is compared: how broken characters are shown depends on what is decoded at a time.
    """
    full = tokenizer.decode(stream.token_ids)
    stops = [full.find(stop) for stop in stream.job.stop if stop in full]
    if bool(stops) != (stream.finish_reason == "stop"):
        return f"finish reason {stream.finish_reason}, and {len(stops)} of {stream.job.stop} in its text"
    if stops:
        before = tokenizer.decode(stream.token_ids[:-1])
        if any(stop in before for stop in stream.job.stop):
            return f"went on after a stop string of {stream.job.stop}"
    expected = full[: min(stops)] if stops else full
    return "" if _ascii(stream.text) == _ascii(expected) else f"text {stream.text!r} is not {expected!r}"


def _note(result: Result, index: int, verdict: Verdict) -> None:
    stream = result.streams[index]
    num_tokens = len(stream.token_ids)
    result.num_tokens += num_tokens
    if verdict.near_ties:
        result.near_ties[index] = verdict.near_ties
    if verdict.wrong_at is not None:
        how = "greedy" if stream.job.temperature == 0 else "sampled"
        result.wrong[index] = (
            f"{stream.request_id}: {how} token {verdict.wrong_at} of {num_tokens} after a prompt of "
            f"{len(stream.job.prompt)} is not the model's, by {verdict.margin:.3g}"
        )
    elif verdict.logprob_error > MAX_LOGPROB_ERROR:
        result.wrong[index] = f"{stream.request_id}: a log-probability is off by {verdict.logprob_error:.3g}"
    result.max_logprob_error = max(result.max_logprob_error, verdict.logprob_error)


def _miscounted(stream: Stream) -> str:
    """Usage is counted once, across all attempts."""
    job, num_tokens = stream.job, len(stream.token_ids)
    if (stream.prompt_tokens, stream.completion_tokens) != (len(job.prompt), num_tokens):
        return f"usage says {stream.prompt_tokens} + {stream.completion_tokens}, not {len(job.prompt)} + {num_tokens}"
    if job.logprobs and len(stream.logprobs) != num_tokens:
        return f"{len(stream.logprobs)} log-probabilities of {num_tokens} tokens"
    return ""


def _misfinished(stream: Stream) -> str:
    num_tokens, max_tokens = len(stream.token_ids), stream.job.max_tokens
    if stream.finish_reason == "stop":
        return "" if stream.job.stop and num_tokens <= max_tokens else "stopped where nothing was to stop it"
    if stream.finish_reason != "length":
        return f"finish reason {stream.finish_reason}"
    return "" if num_tokens == max_tokens else f"{num_tokens} tokens instead of {max_tokens}"


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode().strip()
