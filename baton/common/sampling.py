"""How a request wants its tokens drawn, and what it may ask to be told of them: shared by router and workers."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PENALTY = 100.0
MAX_BIAS = 100.0
MAX_TOP_LOGPROBS = 20
_ROUNDING = 1e-6  # what is 0.01 to a client may reach a worker as a little less


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one choice, already validated and complete (a seed is always present).

    `temperature` 0 is greedy. `top_k` below 1 is off. `stop_token_ids` holds the model's EOS ids unless the client
    asked to ignore them. Limits count tokens.

    Order: repetition, frequency and presence penalty; `logit_bias`; no stop token before `min_tokens` others;
    temperature; top-k; top-p; min-p; draw. The repetition penalty divides (or, below zero, multiplies) the logit of
    every token of prompt and output; the other two are subtracted, the frequency penalty once per occurrence in the
    output, the presence penalty once. `min_p` keeps tokens at least that fraction as likely as the likeliest.

    `logprobs`: report each drawn token's log-probability and that many of the likeliest tokens'; `prompt_logprobs` the
    same for the prompt. Both are those of the model, before any of the settings above. None: not wanted.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int = 0
    choice: int = 0
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {self.seed}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if not (1 - _ROUNDING) / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            bounds = f"[{1 / MAX_PENALTY:g}, {MAX_PENALTY:g}]"
            raise ValueError(f"repetition_penalty must lie in {bounds}, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= MAX_PENALTY:
                raise ValueError(f"{name} must lie within {MAX_PENALTY:g} of 0, got {getattr(self, name)}")
        for token, bias in self.logit_bias:
            if not abs(bias) <= MAX_BIAS:
                raise ValueError(f"logit_bias of token {token} must lie within {MAX_BIAS:g} of 0, got {bias}")
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            if wanted is not None and not 0 <= wanted <= MAX_TOP_LOGPROBS:
                raise ValueError(f"{name} must lie in [0, {MAX_TOP_LOGPROBS}], got {wanted}")

    @property
    def has_penalties(self) -> bool:
        """Whether a draw depends on which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def is_plain(self) -> bool:
        """Whether temperature, top-k, top-p, min-p and seed say it all, so that the fastest way can be taken."""
        edited = self.has_penalties or self.logit_bias or (self.min_tokens and self.stop_token_ids)
        return not edited and self.logprobs is None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities under the model alone. `rank` 1 is the likeliest token.

    `top` holds the likeliest tokens with theirs, most likely first, whether or not the token is among them.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()
