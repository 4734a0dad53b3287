"""The independent reference for drawn tokens and their log-probabilities: transformers' model in float64, its logits
processors in the documented order, and a Philox of its own. Nothing of the engine is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baton.common.sampling import SamplingParams

NEAR_TIE = 1e-3


@dataclass(slots=True)
class SamplingOracle:
    """`near_ties` counts tokens that were accepted although another one was ahead by less than NEAR_TIE."""

    model: torch.nn.Module
    near_ties: int = 0
    checked_tokens: int = 0

    @classmethod
    def load(cls, path: Path) -> SamplingOracle:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
        return cls(model.eval())

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[len(token_ids), vocab_size]: row i is what follows the first i + 1 tokens."""
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([list(token_ids)])).logits[0]
        return logits

    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Of the model alone, natural logarithms."""
        return self.logits(token_ids).log_softmax(dim=-1)

    def check(self, prompt: list[int], output: list[int], sampling: SamplingParams) -> None:
        """Every output token must be the one that the settings draw after what precedes it."""
        logits = self.logits(prompt + output)[len(prompt) - 1 :]
        for index, token in enumerate(output):
            scores = draw_scores(logits[index], prompt, output[:index], sampling)
            best = int(scores.argmax())
            if best != token:
                margin = float(scores[best] - scores[token])
                assert margin < NEAR_TIE, f"output token {index} is {token}, not {best}, by {margin:.3g}: {sampling}"
                self.near_ties += 1
        self.checked_tokens += len(output)


def draw_scores(logits: torch.Tensor, prompt: list[int], output: list[int], sampling: SamplingParams) -> torch.Tensor:
    """What the largest of decides: [vocab_size] float64."""
    edited = _edited(logits.double(), prompt, output, sampling)
    if sampling.temperature == 0:
        return edited
    ids: Any = torch.tensor([prompt + output])
    scores: torch.Tensor = TemperatureLogitsWarper(sampling.temperature)(ids, edited[None])
    if sampling.top_k > 0:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p > 0:
        scores = MinPLogitsWarper(sampling.min_p)(ids, scores)
    position = len(prompt) + len(output)
    return scores[0] + gumbel(sampling.seed, logits.shape[-1], position, sampling.choice)


def _edited(logits: torch.Tensor, prompt: list[int], output: list[int], sampling: SamplingParams) -> torch.Tensor:
    if sampling.repetition_penalty != 1:
        penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        logits = penalty(torch.tensor([prompt + output]), logits[None].clone())[0]
    counts = torch.from_numpy(np.bincount(output, minlength=logits.shape[-1])).double()
    logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    if len(output) < sampling.min_tokens:
        logits[sorted(sampling.stop_token_ids)] = -torch.inf
    return logits


def gumbel(seed: int, num_tokens: int, position: int, choice: int) -> torch.Tensor:
    """Philox4x32-10 with key `seed` and counter (token, position, choice, 0), its first word to a Gumbel variable."""
    c0, c1 = np.arange(num_tokens, dtype=np.uint64), np.full(num_tokens, position, dtype=np.uint64)
    c2, c3 = np.full(num_tokens, choice, dtype=np.uint64), np.zeros(num_tokens, dtype=np.uint64)
    word = np.uint64(2**32 - 1)
    shift = np.uint64(32)
    for number in range(10):
        k0, k1 = (seed + number * 0x9E3779B9) % 2**32, ((seed >> 32) + number * 0xBB67AE85) % 2**32
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & word, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & word
    u = ((c0 >> np.uint64(8)).astype(np.float64) + 0.5) / 2**24
    return torch.from_numpy(-np.log(-np.log(u)))
