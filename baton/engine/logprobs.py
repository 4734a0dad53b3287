"""Log-probabilities of tokens under the model: log-softmax of its unmodified logits. Engine thread, logits' device.

They are on their way to the host before the next step is launched, so that reading them does not wait for that one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from baton.common.sampling import TokenLogprobs
from baton.engine.batch import PrefillSegment
from baton.engine.request import Request
from baton.engine.staging import start_fetch, to_device

MAX_LOGPROB_ROWS = 256  # logits of a whole chunk of prompt could take gigabytes


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """One row per token: int64 and float32 [num_rows], the likeliest tokens [num_rows, num_top]."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def start_fetch(self) -> LogprobRows:
        """Their copies on the host: see `staging.start_fetch`."""
        of_rows = (self.token_ids, self.logprobs, self.ranks, self.top_ids, self.top_logprobs)
        return LogprobRows(*(start_fetch(x) for x in of_rows))

    def described(self) -> list[TokenLogprobs]:
        """Of rows that are on the host."""
        tops = zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        rows = zip(self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist(), tops, strict=True)
        return [
            TokenLogprobs(token, logprob, rank, tuple(zip(top_ids, top_logprobs, strict=True)))
            for token, logprob, rank, (top_ids, top_logprobs) in rows
        ]


def logprob_rows(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> LogprobRows:
    """logits: [num_rows, vocab_size]; token_ids: int64 [num_rows], a negative one stands for any token."""
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids.clamp(min=0).unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top_logprobs, top_ids = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    return LogprobRows(token_ids, chosen.squeeze(1), ranks, top_ids, top_logprobs)


@dataclass(slots=True)
class StepLogprobs:
    """What a launched step will tell of its tokens. Filled at launch, read when the step lands."""

    _drawn: list[tuple[list[Request], LogprobRows]] = field(default_factory=list)
    _prompt: list[tuple[Request, LogprobRows]] = field(default_factory=list)
    _fetched: torch.cuda.Event | None = None

    def add_drawn(self, logits: torch.Tensor, tokens: torch.Tensor, requests: Sequence[Request]) -> None:
        """logits: [num_rows, vocab_size] as the model gave them; tokens: int64 [num_rows], drawn for `requests`."""
        wanted = [(row, r, r.sampling.logprobs) for row, r in enumerate(requests) if r.sampling.logprobs is not None]
        if wanted:
            rows = to_device([row for row, _, _ in wanted], torch.int64, logits.device)
            num_top = max(num_top for _, _, num_top in wanted)
            described = logprob_rows(logits.index_select(0, rows), tokens.index_select(0, rows), num_top)
            self._drawn.append(([r for _, r, _ in wanted], self._fetch(described)))

    def add_prompts(
        self,
        hidden: torch.Tensor,
        segments: Sequence[tuple[PrefillSegment, int]],
        logits_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """hidden: [num_tokens, hidden_size]; `segments` with the row where each begins."""
        for segment, first_row in segments:
            request = segment.request
            if not request.wants_prompt_logprobs:
                continue
            targets = request.token_ids[segment.start + 1 : min(segment.end + 1, request.num_prompt_tokens)]
            for start in range(0, len(targets), MAX_LOGPROB_ROWS):
                token_ids = to_device(targets[start : start + MAX_LOGPROB_ROWS], torch.int64, hidden.device)
                rows = slice(first_row + start, first_row + start + len(token_ids))
                num_top = request.sampling.prompt_logprobs or 0
                described = logprob_rows(logits_of(hidden[rows]), token_ids, num_top)
                self._prompt.append((request, self._fetch(described)))

    def land(self) -> dict[str, TokenLogprobs]:
        """The step has ended: prompts' rows go to their requests. Returns what there is of drawn tokens, by request."""
        if self._fetched is not None:
            self._fetched.synchronize()
        for request, rows in self._prompt:
            request.prompt_logprobs.extend(rows.described())
        return {
            request.request_id: replace(known, top=known.top[: request.sampling.logprobs])
            for requests, rows in self._drawn
            for request, known in zip(requests, rows.described(), strict=True)
        }

    def _fetch(self, rows: LogprobRows) -> LogprobRows:
        on_host = rows.start_fetch()
        if rows.logprobs.device.type == "cuda":
            if self._fetched is None:
                self._fetched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._fetched.record()
        return on_host
