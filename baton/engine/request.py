"""One request inside an engine: what it has, what it still needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.common.sampling import SamplingParams, TokenLogprobs


class Phase(Enum):
    """Where a request stands. HANDED_OVER: prefilled here, its blocks are held until the peer has them."""

    WAITING = "waiting"
    RUNNING = "running"
    HANDED_OVER = "handed_over"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """Owned by the engine thread. `token_ids` is prompt and output; KV exists for `num_computed_tokens` of them.

    `hand_over`: stop after the first token and keep the blocks for the transfer. `num_emitted`: tokens of the prompt
    that earlier attempts already emitted, so the first new token has output position `num_emitted`. `fork_of`: another
    request with the same prompt, whose blocks this one shares if that one still runs when this one starts.

    `num_computed_tokens` runs ahead of the tokens: it counts a step from its launch on, so the last token may be drawn
    and not be known yet. `draw_row` is its row among the draws of the step launched last; `steps_in_flight` counts the
    launched steps that use the request's blocks and have not ended. `prompt_logprobs` grows with the prompt's chunks.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    arrival: float
    hand_over: bool = False
    num_emitted: int = 0
    first_block_to_send: int = 0
    fork_of: str = ""
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    phase: Phase = Phase.WAITING
    draw_row: int = -1
    steps_in_flight: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"request {self.request_id} has an empty prompt")
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def first_output_position(self) -> int:
        """Where the output begins in `token_ids`, that of earlier attempts included."""
        return self.num_prompt_tokens - self.num_emitted

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Only the attempt that emits the first token reports on the prompt."""
        return self.sampling.prompt_logprobs is not None and self.num_emitted == 0

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed_tokens < self.num_prompt_tokens

    @property
    def wants_token(self) -> bool:
        """Whether a decode step is due: the prompt is computed, and what is drawn, known or not, is below the limit."""
        num_drawn = self.num_computed_tokens - self.num_prompt_tokens + 1
        return not self.hand_over and 0 < num_drawn < self.sampling.max_tokens

    @property
    def max_total_tokens(self) -> int:
        """Tokens whose KV this engine may have to hold: a hand-over prefill never appends its first token."""
        return self.num_prompt_tokens + (0 if self.hand_over else self.sampling.max_tokens)

    def finish_reason(self) -> str | None:
        """ "stop" or "length" once the last token ends the request, else None."""
        if self.num_output_tokens == 0:
            return None
        if self.token_ids[-1] in self.sampling.stop_token_ids and self.num_output_tokens >= self.sampling.min_tokens:
            return "stop"
        return "length" if self.num_output_tokens >= self.sampling.max_tokens else None
