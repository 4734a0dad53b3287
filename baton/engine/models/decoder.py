"""The model: weights and forward pass of a dense decoder over a ragged batch. Engine thread, its current stream.

Products that share their input are fused. The residual stream is carried beside the hidden states, so that adding and
normalising can be one kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import embedding

from baton.engine.attention.base import AttentionBackend, AttentionMetadata
from baton.engine.layers.activation import gated_linear
from baton.engine.layers.linear import FusedLinear, linear
from baton.engine.layers.norm import add_rms_norm, rms_norm
from baton.engine.layers.rope import cos_sin_table
from baton.engine.models.config import ModelConfig

AfterLayer = Callable[[int], None]


class Attention:
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.scale = config.head_dim**-0.5
        parts = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        self.qkv = FusedLinear(parts, config.hidden_size, config.qkv_bias, dtype, device)
        self.out = FusedLinear({"o_proj": config.hidden_size}, config.q_size, config.out_bias, dtype, device)
        self.q_norm, self.k_norm = (
            torch.empty(config.head_dim, dtype=dtype, device=device) if config.qk_norm else None for _ in range(2)
        )

    def __call__(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        layer_kv: torch.Tensor,
        meta: AttentionMetadata,
        backend: AttentionBackend,
    ) -> torch.Tensor:
        c = self.config
        heads = self.qkv(x).view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        # [num_tokens, num_heads, head_dim], [num_tokens, num_kv_heads, head_dim] twice
        q, k, v = heads.split_with_sizes([c.num_heads, c.num_kv_heads, c.num_kv_heads], 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, c.rms_norm_eps), rms_norm(k, self.k_norm, c.rms_norm_eps)
        backend.rope_and_store(q, k, v, positions, cos_sin, layer_kv, meta)
        return self.out.parts_of(backend.attend(q, layer_kv, meta, self.scale, (k, v)).flatten(1))

    def checkpoint_views(self, prefix: str) -> dict[str, torch.Tensor]:
        views = self.qkv.checkpoint_views(prefix) | self.out.checkpoint_views(prefix)
        norms = {"q_norm": self.q_norm, "k_norm": self.k_norm}
        return views | {f"{prefix}{name}.weight": norm for name, norm in norms.items() if norm is not None}


class MLP:
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        size = config.intermediate_size
        parts = {"gate_proj": size, "up_proj": size}
        self.gate_up = FusedLinear(parts, config.hidden_size, config.mlp_bias, dtype, device)
        self.down = FusedLinear({"down_proj": config.hidden_size}, size, config.mlp_bias, dtype, device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down.parts_of(gated_linear(x, self.gate_up))


class DecoderLayer:
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.attention = Attention(config, dtype, device)
        self.mlp = MLP(config, dtype, device)
        self.input_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.post_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)

    def checkpoint_views(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}input_layernorm.weight": self.input_norm,
            f"{prefix}post_attention_layernorm.weight": self.post_norm,
            **self.attention.checkpoint_views(f"{prefix}self_attn."),
            **self.mlp.gate_up.checkpoint_views(f"{prefix}mlp."),
            **self.mlp.down.checkpoint_views(f"{prefix}mlp."),
        }


class Decoder:
    """Weights are uninitialised until a loader has filled `checkpoint_views`."""

    def __init__(self, config: ModelConfig, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.embed = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = [DecoderLayer(config, dtype, device) for _ in range(config.num_layers)]
        self.final_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.lm_head = self.embed if config.tie_word_embeddings else torch.empty_like(self.embed)
        self.cos_sin = cos_sin_table(max_positions, config.head_dim, config.rope_theta, device, config.rope_scaling)

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Where each of the checkpoint's tensors goes, by its name there."""
        views = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.final_norm}
        if not self.config.tie_word_embeddings:
            views["lm_head.weight"] = self.lm_head
        for index, layer in enumerate(self.layers):
            views |= layer.checkpoint_views(f"model.layers.{index}.")
        return views

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: AttentionMetadata,
        backend: AttentionBackend,
        after_layer: AfterLayer | None = None,
    ) -> torch.Tensor:
        """input_ids, positions: int64 [num_tokens]; kv_cache as in KVLayout. Returns [num_tokens, hidden_size].

        `after_layer(index)` is called when all work of a layer has been launched.
        """
        eps = self.config.rms_norm_eps
        residual = embedding(input_ids, self.embed)
        x = rms_norm(residual, self.layers[0].input_norm, eps)
        for index, (layer, layer_kv) in enumerate(zip(self.layers, kv_cache.unbind(), strict=True)):
            x = layer.attention(x, positions, self.cos_sin, layer_kv, meta, backend)
            x, residual = add_rms_norm(x, residual, layer.post_norm, eps)
            x = layer.mlp(x)
            if after_layer is not None:
                after_layer(index)
            following = self.layers[index + 1].input_norm if index + 1 < len(self.layers) else self.final_norm
            x, residual = add_rms_norm(x, residual, following, eps)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [num_rows, hidden_size]. Returns [num_rows, vocab_size] in the model's type."""
        return linear(hidden, self.lm_head)
