"""The independent reference for generated tokens: transformers in float32, with float64 as the judge of near-ties."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

NEAR_TIE = 1e-4


@dataclass(slots=True)
class GreedyOracle:
    """Checks greedy continuations of one checkpoint. `near_ties` counts tokens accepted because of a near-tie."""

    model: torch.nn.Module
    near_ties: int = 0
    checked_tokens: int = 0
    mismatches: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> GreedyOracle:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
        return cls(model.eval())

    def check(self, prompt: list[int], output: list[int]) -> None:
        """Every output token must be the argmax after what precedes it, which by induction makes the stream greedy.

        One forward over prompt and output gives all positions. A token whose logit is within NEAR_TIE of the best is
        counted as a near-tie (invariant I7), any other difference fails the assertion.
        """
        tokens = torch.tensor([prompt + output[:-1]])
        with torch.inference_mode():
            logits = self.model(tokens).logits[0, len(prompt) - 1 :]  # [len(output), vocab]
        chosen = torch.tensor(output)
        best, best_ids = logits.max(dim=-1)
        margins = best - logits.gather(1, chosen[:, None])[:, 0]
        for index in torch.nonzero(chosen != best_ids)[:, 0].tolist():
            margin = float(margins[index])
            assert margin < NEAR_TIE, (
                f"output token {index} is {output[index]}, the reference says {int(best_ids[index])} "
                f"by a margin of {margin:.3g}; prompt of {len(prompt)} tokens"
            )
            self.near_ties += 1
        self.checked_tokens += len(output)
