"""The judge of tokens: a dense decoder in float64 that shares no code with the engine's forward pass.

Every emitted token must win at its position, given what was emitted before it; by induction the stream is then that of
an undisturbed run (invariant I7). A token that loses by less than `near_tie` is a near-tie: float32 may take either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from baton.common.errors import ConfigError
from baton.engine.layers.rope import LinearScaling, Llama3Scaling, RopeScaling
from baton.engine.models.config import ModelConfig, load_model_config
from baton.engine.models.loader import checkpoint_files
from baton.engine.sampler import SamplingRows, gumbel

NEAR_TIE = 1e-4
MAX_SQUARES = 1 << 21  # of one forward: sequences times the square of their padded length
_WORD = 0xFFFFFFFF
_PROJECTIONS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a request was given, in token ids, and what it answered. `temperature` 0 is greedy.

    `logprobs`: those that it reported for its output, none where it was not asked to.
    """

    prompt: tuple[int, ...]
    output: list[int]
    temperature: float
    seed: int
    logprobs: list[float] = field(default_factory=list)

    @property
    def num_read(self) -> int:
        """Tokens that the model has to read to know them all: the last one only answers."""
        return len(self.prompt) + len(self.output) - 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wrong_at`: index of the first output token that the model would not have drawn, by `margin`.

    `logprob_error`: the largest difference of a reported log-probability from the model's.
    """

    near_ties: int
    wrong_at: int | None = None
    margin: float = 0.0
    logprob_error: float = 0.0


class Reference:
    """One checkpoint in float64. Raises ConfigError for one with weights or a rotation that it does not know."""

    def __init__(self, model_dir: Path, near_tie: float = NEAR_TIE) -> None:
        self.config = load_model_config(model_dir)
        self._near_tie = near_tie
        self._weights: dict[str, torch.Tensor] = {}
        for file in checkpoint_files(model_dir):
            self._weights |= {name: tensor.double() for name, tensor in load_file(str(file)).items()}
        _refuse_unknown(self._weights, self.config)
        self._frequencies = _frequencies(self.config)

    def judge_all(self, spoken: Sequence[Spoken]) -> Iterator[tuple[int, Verdict]]:
        """The index and verdict of each, as they are known; several sequences of like length go through at a time."""
        by_length = sorted(range(len(spoken)), key=lambda index: spoken[index].num_read)
        while by_length:
            count = max(1, min(len(by_length), MAX_SQUARES // max(spoken[by_length[-1]].num_read, 1) ** 2))
            batch = [by_length.pop() for _ in range(count)]
            yield from zip(batch, self._judge([spoken[index] for index in batch]), strict=True)

    def judge(self, spoken: Spoken) -> Verdict:
        return self._judge([spoken])[0]

    def _judge(self, batch: Sequence[Spoken]) -> list[Verdict]:
        with torch.inference_mode():
            hidden = self._hidden(_padded(batch))
            return [
                self._verdict(one, self._scores(row[len(one.prompt) - 1 : one.num_read]))
                for one, row in zip(batch, hidden, strict=True)
            ]

    def _verdict(self, one: Spoken, scores: torch.Tensor) -> Verdict:
        """`scores`: float64 [len(output), vocab_size]"""
        chosen = torch.tensor(one.output)[:, None]
        error = _logprob_error(scores, chosen, one.logprobs)
        if one.temperature > 0:
            scores = scores / one.temperature + self._noise(len(one.prompt), len(one.output), one.seed)
        margins = scores.amax(dim=-1) - scores.gather(1, chosen)[:, 0]
        wrong = torch.nonzero(margins >= self._near_tie)[:, 0].tolist()
        if wrong:
            return Verdict(0, wrong[0], float(margins[wrong[0]]), error)
        return Verdict(int((margins > 0).sum()), logprob_error=error)

    # ---- the model

    def _hidden(self, token_ids: torch.Tensor) -> torch.Tensor:
        """float64 [batch, length, hidden_size] after the last norm; rows are padded behind, where nothing looks."""
        x = self._weights["model.embed_tokens.weight"][token_ids]
        angles = torch.arange(token_ids.shape[1], dtype=torch.float64)[:, None] * self._frequencies
        both = torch.cat((angles, angles), dim=-1)  # [length, head_dim]: the same for both halves of a head
        cos, sin = both.cos(), both.sin()
        for layer in range(self.config.num_layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attend(self._norm(x, f"{prefix}input_layernorm"), f"{prefix}self_attn.", cos, sin)
            h = self._norm(x, f"{prefix}post_attention_layernorm")
            gate, up = self._project(h, f"{prefix}mlp.gate_proj"), self._project(h, f"{prefix}mlp.up_proj")
            x = x + self._project(silu(gate) * up, f"{prefix}mlp.down_proj")
        return self._norm(x, "model.norm")

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        return linear(hidden, self._weights[head])

    def _attend(self, x: torch.Tensor, prefix: str, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        def heads(name: str) -> torch.Tensor:  # [batch, num_heads, length, head_dim]
            projected = self._project(x, f"{prefix}{name}_proj").view(*x.shape[:2], -1, self.config.head_dim)
            normed = self._norm(projected, f"{prefix}{name}_norm") if self.config.qk_norm and name != "v" else projected
            return normed.transpose(1, 2)

        q, k = _rotated(heads("q"), cos, sin), _rotated(heads("k"), cos, sin)
        attended = scaled_dot_product_attention(q, k, heads("v"), is_causal=True, enable_gqa=True)
        return self._project(attended.transpose(1, 2).flatten(2), f"{prefix}o_proj")

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


def _logprob_error(scores: torch.Tensor, chosen: torch.Tensor, reported: list[float]) -> float:
    """Infinite where their number is not that of the tokens."""
    if not reported:
        return 0.0
    if len(reported) != len(chosen):
        return math.inf
    true = scores.log_softmax(dim=-1).gather(1, chosen)[:, 0]
    return float((true - torch.tensor(reported, dtype=torch.float64)).abs().max())


def _padded(batch: Sequence[Spoken]) -> torch.Tensor:
    """int64 [batch, longest]"""
    ids = torch.zeros(len(batch), max(one.num_read for one in batch), dtype=torch.int64)
    for row, one in zip(ids, batch, strict=True):
        row[: one.num_read] = torch.tensor([*one.prompt, *one.output[:-1]])
    return ids


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians per position of each pair of dimensions: float64 [head_dim / 2]."""
    plain = [config.rope_theta ** -(dim / config.head_dim) for dim in range(0, config.head_dim, 2)]
    return torch.tensor([_scaled(frequency, config.rope_scaling) for frequency in plain], dtype=torch.float64)


def _scaled(frequency: float, scaling: RopeScaling | None) -> float:
    if scaling is None:
        return frequency
    if isinstance(scaling, LinearScaling):
        return frequency / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequency, scaling)
    raise ConfigError("model", f"tokens of a model with {scaling} cannot be judged")


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    """By wavelength: long ones are squeezed, short ones kept, and between the two bounds a straight line in turns."""
    wavelength = 2 * math.pi / frequency
    longest_kept = scaling.original_max_positions / scaling.high_freq_factor
    shortest_squeezed = scaling.original_max_positions / scaling.low_freq_factor
    if wavelength < longest_kept:
        return frequency
    if wavelength > shortest_squeezed:
        return frequency / scaling.factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / span
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def _refuse_unknown(weights: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """A weight that this forward never reads means another model."""
    per_layer = [*_PROJECTIONS, *(_NORMS if config.qk_norm else _NORMS[:2])]
    layers = {f"model.layers.{layer}.{name}" for layer in range(config.num_layers) for name in per_layer}
    known = layers | {"model.embed_tokens", "model.norm", "lm_head"}
    unknown = sorted(
        name
        for name in weights
        if not name.endswith("rotary_emb.inv_freq")
        and not (name.removesuffix(".weight") in known or name.removesuffix(".bias") in layers)
    )
    if unknown:
        raise ConfigError("model", f"tokens of a model with the weight {unknown[0]} cannot be judged")
