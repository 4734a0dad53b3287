"""The router's request spec, checked and turned into the engine's own types.

Pure; called on the asyncio thread when a command arrives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.common.errors import InvalidRequest
from baton.common.sampling import SamplingParams
from baton.engine.request import Request
from protos import worker_pb2 as pb


@dataclass(frozen=True, slots=True)
class Limits:
    """What the loaded model allows. Lengths count tokens, prompt and output together."""

    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Spec:
    """A checked RequestSpec. `deadline_s`: seconds from acceptance, or None."""

    token_ids: list[int]
    num_emitted: int
    sampling: SamplingParams
    deadline_s: float | None

    def request(
        self, engine_id: str, arrival: float, *, hand_over: bool = False, first_block: int = 0, fork_of: str = ""
    ) -> Request:
        """A fresh engine request; `first_block` is the first logical block that a hand-over has to send.

        `fork_of`: the engine's id of the request whose prompt it shares.
        """
        return Request(
            request_id=engine_id,
            token_ids=list(self.token_ids),
            sampling=self.sampling,
            arrival=arrival,
            hand_over=hand_over,
            num_emitted=self.num_emitted,
            first_block_to_send=first_block,
            fork_of=fork_of,
        )


def read_spec(spec: pb.RequestSpec, limits: Limits) -> Spec:
    """Raises InvalidRequest with a sentence for the client when the spec cannot be served here."""
    token_ids = list(spec.token_ids)
    _check_tokens(token_ids, spec, limits)
    return Spec(token_ids, spec.num_emitted, _read_sampling(spec, limits.vocab_size), _read_deadline(spec))


def _check_tokens(token_ids: list[int], spec: pb.RequestSpec, limits: Limits) -> None:
    if not token_ids:
        raise InvalidRequest("the prompt is empty", "prompt")
    if max(token_ids) >= limits.vocab_size:
        raise InvalidRequest(
            f"token id {max(token_ids)} is not in the vocabulary of {limits.vocab_size} tokens", "prompt"
        )
    if spec.num_emitted >= len(token_ids):
        raise InvalidRequest(
            f"{spec.num_emitted} emitted tokens leave no prompt in a sequence of {len(token_ids)}", "num_emitted"
        )
    if len(token_ids) + spec.max_tokens > limits.max_model_len:
        raise InvalidRequest(
            f"{len(token_ids)} prompt tokens and max_tokens {spec.max_tokens} exceed the model's length of "
            f"{limits.max_model_len} tokens",
            "max_tokens",
            "context_length_exceeded",
        )


def _read_sampling(spec: pb.RequestSpec, vocab_size: int) -> SamplingParams:
    if spec.logit_bias and max(spec.logit_bias) >= vocab_size:
        raise InvalidRequest(
            f"token id {max(spec.logit_bias)} is not in the vocabulary of {vocab_size} tokens", "logit_bias"
        )
    if spec.min_tokens and len({token for token in spec.stop_token_ids if token < vocab_size}) == vocab_size:
        raise InvalidRequest("min_tokens leaves no token to draw: every one is a stop token", "min_tokens")
    try:
        return SamplingParams(
            max_tokens=spec.max_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=spec.top_k,
            seed=spec.seed,
            choice=spec.choice,
            min_tokens=spec.min_tokens,
            stop_token_ids=frozenset(spec.stop_token_ids),
            min_p=spec.min_p,
            repetition_penalty=spec.repetition_penalty or 1.0,
            presence_penalty=spec.presence_penalty,
            frequency_penalty=spec.frequency_penalty,
            logit_bias=tuple(sorted(spec.logit_bias.items())),
            logprobs=spec.logprobs if spec.HasField("logprobs") else None,
            prompt_logprobs=spec.prompt_logprobs if spec.HasField("prompt_logprobs") else None,
        )
    except ValueError as error:
        raise InvalidRequest(str(error), "sampling") from None


def _read_deadline(spec: pb.RequestSpec) -> float | None:
    if not (math.isfinite(spec.deadline_s) and spec.deadline_s >= 0.0):
        raise InvalidRequest(f"deadline_s must be a number of seconds from 0, got {spec.deadline_s}", "deadline_s")
    return spec.deadline_s or None
