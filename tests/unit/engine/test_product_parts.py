"""A model whose products come in parts: the same tokens as from whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.engine.layers.linear import FusedLinear
from tests.support.engine_harness import greedy, make_harness, random_prompt, seeded
from tests.support.family_checkpoints import write_family
from tests.support.tiny_model import make_tiny_llama


def test_the_rotary_embedding_sums_q_k_and_v(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of a number add up to it without a rounding error, so nothing may differ."""

    def generate() -> dict[str, list[int]]:
        requests = [greedy(f"g{n}", random_prompt(n, seed=n), 20) for n in (1, 16, 40)]
        return make_harness(model_dir).generate(*requests, seeded("s", random_prompt(9), 20))

    model_dir = make_tiny_llama(tmp_path, seed=3, std=0.2)
    expected = generate()
    kinds = set()

    def halves(layer: FusedLinear, x: torch.Tensor, kind: str = "parts") -> torch.Tensor:
        kinds.add(kind)
        return torch.stack([layer(x) / 2] * 2) if kind == "qkv" else layer(x)

    monkeypatch.setattr(FusedLinear, "parts_of", halves)
    assert generate() == expected
    assert kinds == {"parts", "qkv"}


def test_what_is_normalised_between_product_and_rotation_comes_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family(tmp_path, "qwen3", seed=1)
    kinds = []

    def remember(layer: FusedLinear, x: torch.Tensor, kind: str = "parts") -> torch.Tensor:
        kinds.append(kind)
        return layer(x)

    monkeypatch.setattr(FusedLinear, "parts_of", remember)
    make_harness(tmp_path).generate(greedy("g", random_prompt(5), 2))
    assert set(kinds) == {"parts"}
