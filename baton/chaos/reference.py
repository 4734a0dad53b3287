"""The judge of tokens: a dense Llama in float64 that shares no code with the engine's forward pass.

Every emitted token must win at its position, given what was emitted before it; by induction the stream is then that of
an undisturbed run (invariant I7). A token that loses by less than NEAR_TIE is a near-tie: float32 may take either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from baton.engine.models.config import load_model_config
from baton.engine.models.loader import checkpoint_files
from baton.engine.sampler import SamplingRows, gumbel

NEAR_TIE = 1e-4
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wrong_at`: index of the first output token that the model would not have drawn, by `margin`."""

    near_ties: int
    wrong_at: int | None = None
    margin: float = 0.0


class Reference:
    """One checkpoint in float64. `judge` runs one forward over prompt and output."""

    def __init__(self, model_dir: Path) -> None:
        self.config = load_model_config(model_dir)
        self._weights: dict[str, torch.Tensor] = {}
        for file in checkpoint_files(model_dir):
            self._weights |= {name: tensor.double() for name, tensor in load_file(str(file)).items()}

    def judge(self, prompt: tuple[int, ...], output: list[int], temperature: float, seed: int) -> Verdict:
        """`temperature` 0 is greedy; otherwise without top-k and top-p."""
        with torch.inference_mode():
            scores = self.logits([*prompt, *output[:-1]])[len(prompt) - 1 :]  # [len(output), vocab_size]
            if temperature > 0:
                scores = scores / temperature + self._noise(len(prompt), len(output), seed)
            margins = scores.amax(dim=-1) - scores.gather(1, torch.tensor(output)[:, None])[:, 0]
        wrong = torch.nonzero(margins >= NEAR_TIE)[:, 0].tolist()
        if wrong:
            return Verdict(0, wrong[0], float(margins[wrong[0]]))
        return Verdict(int((margins > 0).sum()))

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float64 [len(token_ids), vocab_size]"""
        c, w = self.config, self._weights
        x = w["model.embed_tokens.weight"][torch.tensor(token_ids)]
        cos, sin = _rotation(len(token_ids), c.head_dim, c.rope_theta)
        for layer in range(c.num_layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attend(self._norm(x, f"{prefix}input_layernorm"), f"{prefix}self_attn.", cos, sin)
            h = self._norm(x, f"{prefix}post_attention_layernorm")
            gate, up = self._project(h, f"{prefix}mlp.gate_proj"), self._project(h, f"{prefix}mlp.up_proj")
            x = x + self._project(silu(gate) * up, f"{prefix}mlp.down_proj")
        head = w["model.embed_tokens.weight"] if c.tie_word_embeddings else w["lm_head.weight"]
        return linear(self._norm(x, "model.norm"), head)

    def _attend(self, x: torch.Tensor, prefix: str, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        c, n = self.config, len(x)
        q = _rotated(self._project(x, f"{prefix}q_proj").view(n, c.num_heads, c.head_dim), cos, sin)
        k = _rotated(self._project(x, f"{prefix}k_proj").view(n, c.num_kv_heads, c.head_dim), cos, sin)
        v = self._project(x, f"{prefix}v_proj").view(n, c.num_kv_heads, c.head_dim)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, num_heads, num_tokens, head_dim]
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self._project(attended[0].transpose(0, 1).flatten(1), f"{prefix}o_proj")

    def _project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self._weights[f"{name}.weight"]

    def _noise(self, start: int, count: int, seed: int) -> torch.Tensor:
        """The Gumbel noise of positions [start, start + count): float64 [count, vocab_size]."""

        def column(value: int) -> torch.Tensor:
            return torch.full((count,), value, dtype=torch.int64)

        ones = torch.ones(count)
        rows = SamplingRows(
            drawn=torch.arange(count),
            temperature=ones,
            top_k=column(self.config.vocab_size),
            top_p=ones,
            key_low=column(seed & _WORD),
            key_high=column(seed >> 32),
            position=torch.arange(start, start + count),
            choice=column(0),
            any_drawn=True,
            any_restricted=False,
        )
        return gumbel(rows, self.config.vocab_size)


def _rotation(length: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each float64 [length, 1, head_dim]: the same angles for both halves of a head."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    both = torch.cat((angles, angles), dim=-1)[:, None]
    return both.cos(), both.sin()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
