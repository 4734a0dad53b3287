"""What changes logits before a token is drawn: penalties, then logit bias, then the mask of early stop tokens.

Owned by the runner, engine thread, on the device of the logits, which is never waited for. Everything follows from the
request's token ids, so a worker that takes a request over goes on as the one before would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from baton.engine.request import Request
from baton.engine.staging import to_device


@dataclass(slots=True)
class _History:
    """What was seen of one request's tokens so far. bool and int32 [vocab_size]."""

    in_prompt: torch.Tensor
    output_counts: torch.Tensor
    num_known: int

    def count(self, tokens: torch.Tensor) -> None:
        """Of the output, int64."""
        self.output_counts.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))
        self.num_known += len(tokens)


@dataclass(frozen=True, slots=True)
class _Entries:
    """What to add to one row: int64 and float32 [num_entries]. Each token occurs once."""

    tokens: torch.Tensor
    values: torch.Tensor


class LogitEditor:
    """Keeps, for every living request, how often each token occurred if that matters, and what its settings add."""

    def __init__(self) -> None:
        self._histories: WeakKeyDictionary[Request, _History] = WeakKeyDictionary()
        self._biases: WeakKeyDictionary[Request, _Entries] = WeakKeyDictionary()
        self._early_stops: WeakKeyDictionary[Request, _Entries] = WeakKeyDictionary()

    def edit(
        self, logits: torch.Tensor, requests: Sequence[Request], positions: Sequence[int], draws: torch.Tensor
    ) -> torch.Tensor:
        """logits: [num_rows, vocab_size], one row per request; returns them, or float32 copies where any row changes.

        `positions`: where in its sequence each request's token will stand. Requests with penalties must know every
        token before that, but for the last one: if it is not known yet, `draws` has it, int64, at their `draw_row`.
        """
        if all(request.sampling.is_plain for request in requests):
            return logits
        edited = logits.to(torch.float32, copy=True)
        self._penalise(edited, requests, positions, draws)
        self._add_biases(edited, requests)
        self._ban_early_stops(edited, requests, positions)
        return edited

    def _add_biases(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        rows = [row for row, request in enumerate(requests) if request.sampling.logit_bias]
        for row in rows:
            if requests[row] not in self._biases:
                tokens, values = zip(*requests[row].sampling.logit_bias, strict=True)
                self._biases[requests[row]] = _entries(tokens, values, logits.device)
        _add(logits, rows, [self._biases[requests[row]] for row in rows])

    def _ban_early_stops(self, logits: torch.Tensor, requests: Sequence[Request], positions: Sequence[int]) -> None:
        rows = [
            row
            for row, (request, position) in enumerate(zip(requests, positions, strict=True))
            if position - request.num_prompt_tokens < request.sampling.min_tokens
        ]
        for row in rows:
            if requests[row] not in self._early_stops:
                tokens = [token for token in requests[row].sampling.stop_token_ids if token < logits.shape[1]]
                self._early_stops[requests[row]] = _entries(tokens, [-torch.inf] * len(tokens), logits.device)
        _add(logits, rows, [self._early_stops[requests[row]] for row in rows])

    def _penalise(
        self, logits: torch.Tensor, requests: Sequence[Request], positions: Sequence[int], draws: torch.Tensor
    ) -> None:
        rows = [row for row, request in enumerate(requests) if request.sampling.has_penalties]
        if not rows:
            return
        histories = [self._history(requests[row], positions[row], logits, draws) for row in rows]
        counts = torch.stack([history.output_counts for history in histories])  # [len(rows), vocab_size]
        in_prompt = torch.stack([history.in_prompt for history in histories])
        settings = [requests[row].sampling for row in rows]
        values = [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in settings]
        flat = to_device([value for of_row in values for value in of_row], torch.float32, logits.device)
        repetition, frequency, presence = flat.view(-1, 3, 1).unbind(dim=1)
        at = _ids(rows, logits.device)
        selected = logits.index_select(0, at)
        repeated = torch.where(selected > 0, selected / repetition, selected * repetition)
        selected = torch.where(in_prompt | (counts > 0), repeated, selected)
        logits.index_copy_(0, at, selected - frequency * counts - presence * (counts > 0))

    def _history(self, request: Request, position: int, logits: torch.Tensor, draws: torch.Tensor) -> _History:
        """Brought up to date; the next token will stand at `position`."""
        tokens, first_output = request.token_ids, request.first_output_position
        history = self._histories.get(request)
        if history is None:
            vocab_size, device = logits.shape[1], logits.device
            in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            in_prompt.index_fill_(0, _ids(tokens[:first_output], device), True)
            counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)
            history = self._histories[request] = _History(in_prompt, counts, first_output)
        fresh = tokens[history.num_known :]
        if fresh:
            history.count(_ids(fresh, logits.device))
        if history.num_known == position - 1 and len(tokens) < position:
            # Negative where the logits before were not finite: this draw comes to nothing, too.
            history.count(draws[request.draw_row : request.draw_row + 1].clamp(min=0))
        if history.num_known != position:
            message = f"request {request.request_id} knows {history.num_known} of the {position} tokens before a draw"
            raise RuntimeError(message)
        return history


def _entries(tokens: Sequence[int], values: Sequence[float], device: torch.device) -> _Entries:
    return _Entries(_ids(tokens, device), to_device(values, torch.float32, device))


def _add(logits: torch.Tensor, rows: Sequence[int], entries: Sequence[_Entries]) -> None:
    """Add each row's entries, all rows at once."""
    if rows:
        row_of_entry = [row for row, one in zip(rows, entries, strict=True) for _ in range(len(one.tokens))]
        at = _ids(row_of_entry, logits.device), torch.cat([one.tokens for one in entries])
        logits[at] += torch.cat([one.values for one in entries])


def _ids(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return to_device(values, torch.int64, device)
