"""The sampling settings of a request body, the same for every endpoint, and what becomes of them. Pure.

Base of the endpoints' request models. Strict: "3" and true are no ints. None stands for the default.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from baton.common.errors import InvalidRequest
from baton.common.sampling import MAX_BIAS, MAX_PENALTY, MAX_TOP_LOGPROBS, SamplingParams
from router.sampling_defaults import SamplingDefaults

MAX_STOP_STRINGS: Final = 4
MAX_CHOICES: Final = 128
MAX_TOKENS: Final = 2**31 - 1
_MAX_STOP_LENGTH: Final = 1024
_MAX_STOP_TOKENS: Final = 1024
_MAX_BIASES: Final = 1024
_MAX_TEMPERATURE: Final = 100.0
_GREEDY_BELOW: Final = 1e-5
_MIN_TOP_P: Final = 1e-6

StopString = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NumTop = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]


class SamplingFields(BaseModel):
    """What each means is said at `baton.common.sampling.SamplingParams`.

    `stop` strings are looked for here in the router; with `include_stop_str_in_output` the text ends behind the one
    found, or behind the stop token.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=_MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1 / MAX_PENALTY, le=MAX_PENALTY)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenIdText, Bias], Field(max_length=_MAX_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=_MAX_STOP_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def resolve(
        self,
        defaults: SamplingDefaults,
        *,
        max_tokens: int,
        eos_ids: frozenset[int],
        vocab_size: int,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The complete settings of choice 0. Raises InvalidRequest naming the field that does not fit."""
        temperature = _or(self.temperature, defaults.temperature)
        top_k = defaults.top_k if self.top_k is None else self.top_k
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_p=max(_or(self.top_p, defaults.top_p), _MIN_TOP_P),
            top_k=-1 if top_k < 1 else min(top_k, MAX_TOKENS),
            seed=secrets.randbits(64) if self.seed is None else self.seed % 2**64,
            min_tokens=self._min_tokens(max_tokens),
            stop_token_ids=self._stop_ids(vocab_size) | (frozenset() if self.ignore_eos else eos_ids),
            min_p=_or(self.min_p, defaults.min_p),
            repetition_penalty=_or(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=self._biases(vocab_size),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _min_tokens(self, max_tokens: int) -> int:
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens {min_tokens} is more than max_tokens {max_tokens}", "min_tokens")
        return min_tokens

    def _stop_ids(self, vocab_size: int) -> frozenset[int]:
        ids = frozenset(self.stop_token_ids or ())
        _check_in_vocabulary(ids, vocab_size, "stop_token_ids")
        return ids

    def _biases(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        """Ids may be written with leading zeros; the last of equal ones counts."""
        biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        _check_in_vocabulary(biases, vocab_size, "logit_bias")
        return tuple(sorted((token, bias) for token, bias in biases.items() if bias))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_in_vocabulary(ids: frozenset[int] | dict[int, float], vocab_size: int, param: str) -> None:
    if ids and max(ids) >= vocab_size:
        raise InvalidRequest(f"token id {max(ids)} is outside the vocabulary of {vocab_size}", param)
