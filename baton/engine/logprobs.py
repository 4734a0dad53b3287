"""Log-probabilities of tokens under the model: log-softmax of its unmodified logits. Engine thread, logits' device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from baton.common.sampling import TokenLogprobs
from baton.engine.batch import PrefillSegment
from baton.engine.request import Request

_ROWS_AT_ONCE = 256  # logits of a whole chunk of prompt could take gigabytes


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """One row per token: int64 and float32 [num_rows], the likeliest tokens [num_rows, num_top]. On the device."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def to_host(self) -> list[TokenLogprobs]:
        """Waits for the device."""
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

    def add_drawn(self, logits: torch.Tensor, tokens: torch.Tensor, requests: Sequence[Request]) -> None:
        """logits: [num_rows, vocab_size] as the model gave them; tokens: int64 [num_rows], drawn for `requests`."""
        wanted = [(row, r, r.sampling.logprobs) for row, r in enumerate(requests) if r.sampling.logprobs is not None]
        if wanted:
            rows = torch.tensor([row for row, _, _ in wanted]).to(logits.device)
            num_top = max(num_top for _, _, num_top in wanted)
            self._drawn.append(([r for _, r, _ in wanted], logprob_rows(logits[rows], tokens[rows], num_top)))

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
            for start in range(0, len(targets), _ROWS_AT_ONCE):
                token_ids = torch.tensor(targets[start : start + _ROWS_AT_ONCE]).to(hidden.device)
                rows = slice(first_row + start, first_row + start + len(token_ids))
                num_top = request.sampling.prompt_logprobs or 0
                self._prompt.append((request, logprob_rows(logits_of(hidden[rows]), token_ids, num_top)))

    def land(self) -> dict[str, TokenLogprobs]:
        """The step has ended: prompts' rows go to their requests. Returns what there is of drawn tokens, by request."""
        for request, rows in self._prompt:
            request.prompt_logprobs.extend(rows.to_host())
        return {
            request.request_id: replace(known, top=known.top[: request.sampling.logprobs])
            for requests, rows in self._drawn
            for request, known in zip(requests, rows.to_host(), strict=True)
        }
