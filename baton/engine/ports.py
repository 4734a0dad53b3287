"""How an engine meets the outside: commands go in through its inbox, results come out through `Ports`.

Request ids are opaque to the engine. A worker's shell uses one id per attempt, so ids never repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.common.sampling import TokenLogprobs
from baton.engine.layer_groups import LinkSpeed
from baton.engine.request import Request

# ---- commands: posted from any thread, drained by the engine thread once per step


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Queue a request. `request.hand_over` makes it a prefill for another worker."""

    request: Request


@dataclass(frozen=True, slots=True)
class Reserve:
    """Take blocks for a prompt that another worker prefills. Prefix-cached blocks are shared, not transferred.

    `reply` is called once on the engine thread with a Reservation or a Refusal.
    """

    reservation_id: str
    token_ids: list[int]
    max_total_tokens: int
    reply: Callable[[Reservation | Refusal], None]


@dataclass(frozen=True, slots=True)
class Reservation:
    """`block_table` covers the prompt; `first_block` is the first logical block that has to be received."""

    block_table: tuple[int, ...]
    first_block: int
    generation: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """code: "busy" (no room now), "invalid" (never fits here) or "internal" (a defect)."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Admission:
    """Turn a reservation into a running request: its prompt's KV is complete and `first_token` is sampled.

    `request` was built with the prompt only; the engine appends `first_token` without emitting it again.
    """

    reservation_id: str
    request: Request
    first_token: int


@dataclass(frozen=True, slots=True)
class Release:
    """Give back the blocks of a reservation or of a handed-over request. Unknown ids are a no-op."""

    id: str


@dataclass(frozen=True, slots=True)
class Abort:
    """End a queued or running request without a finish. A hand-over keeps its blocks until Release. Unknown: no-op."""

    request_id: str


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """How fast KV leaves for other workers, for the choice of layer groups."""

    speed: LinkSpeed


Command = AddRequest | Reserve | Admission | Release | Abort | LinkMeasured

# ---- results: called on the engine thread; implementations must not block


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """New tokens of one request. `position` is the output position of the first of them over all attempts.

    `logprobs`: one per token, empty unless asked for. `prompt_logprobs`: with position 0 only, one for every token of
    the prompt but the first.
    """

    request_id: str
    position: int
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request that was accepted and now ends without finishing. Its blocks are already back, except a hand-over's."""

    request_id: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class LifecycleEvent:
    """name: see baton.common.events. `at` is the engine clock."""

    request_id: str
    name: str
    at: float


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished engine step. Seconds; counts of what the batch held."""

    outputs: tuple[TokenOutput, ...]
    events: tuple[LifecycleEvent, ...]
    failures: tuple[RequestFailed, ...]
    num_prefill_tokens: int
    num_decode_seqs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SegmentWritten:
    """KV of layers [layer_start, layer_end) and logical blocks [block_start, block_end) of a hand-over is launched.

    `event` (CUDA only) fires when it is written; on the CPU it is None and the KV is written already.
    `block_ids` are the physical blocks, [block_end - block_start].
    """

    request_id: str
    layer_start: int
    layer_end: int
    block_start: int
    block_end: int
    block_ids: tuple[int, ...]
    event: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """A hand-over has its first token. `finish_reason` is set when the request ends right there.

    The log-probabilities are those of `TokenOutput`.
    """

    request_id: str
    num_tokens: int
    first_token: int
    finish_reason: str | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Ports(Protocol):
    """The three joints of the hand-over and the outlet of every step."""

    def on_layer_group(self, segment: SegmentWritten) -> None: ...

    def on_prefill_done(self, done: PrefillDone) -> None: ...

    def on_step(self, report: StepReport) -> None: ...

    def ready_to_admit(self) -> Sequence[Admission]:
        """Hand-overs whose KV is verified since the last call."""
        ...

    def on_lost(self, reason: str) -> None:
        """A defect or a lost device has ended the engine's thread: no request goes on, no report follows."""
        ...


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Each counted from its own list (invariant I4)."""

    free: int
    cached: int
    running: int
    leased: int
    quarantined: int
    total: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot, safe to read from any thread. `progress_age`: 0 when idle, else seconds since the last step ended.

    `failed_steps_in_a_row`: steps that raised since the last one that went well.
    """

    blocks: BlockCounts
    num_waiting: int
    num_running: int
    queued_prefill_tokens: int
    steps: int
    progress_age: float
    failed_steps_in_a_row: int = 0
