"""What Baton needs to know of a checkpoint's config.json, and refusal of what it does not support.

A setting that would change the model's output and is not implemented is an error that names its key: a wrong answer is
worse than none. Absent keys mean what they mean in transformers, which differs from family to family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.common.errors import ConfigError
from baton.engine.layers.rope import RopeScaling
from baton.engine.models.fields import Content, fault, flag, positive, size
from baton.engine.models.rope_config import read_rope


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's name says beyond its keys.

    `qkv_bias` None: the key `attention_bias` decides. `mlp_bias`: the key of that name is read. `kv_heads_required`: an
    absent `num_key_value_heads` would be a number of the family's own. `head_dim` None: hidden size over heads.
    `default_window`: the sliding window of a config that names none; `window_flag`: `use_sliding_window` enables it.
    """

    qkv_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    kv_heads_required: bool = True
    head_dim: int | None = None
    default_window: int | None = 4096
    window_flag: bool = False


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(mlp_bias=True, kv_heads_required=False, default_window=None),
    "MistralForCausalLM": Family(qkv_bias=False),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window_flag=True),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, window_flag=True),
}
_SUPPORTED = ", ".join(FAMILIES)
# Keys of relatives and variants that would change the output: refused unless they say "nothing special".
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1,),
    "quantization_config": (),
    "auto_map": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "attention_multiplier": (),
    "residual_multiplier": (1,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "no_rope_layers": ([],),
    "attention_chunk_size": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a dense decoder. Sizes count elements.

    `qk_norm`: queries and keys are normalised per head before their rotation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def load_model_config(model_dir: Path) -> ModelConfig:
    """Read `model_dir`/config.json. Raises ConfigError naming the key at fault."""
    file = model_dir / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("model", f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError("model", f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError("model", f"{file} must hold a JSON object")
    return parse_model_config(content)


def parse_model_config(content: Mapping[str, object]) -> ModelConfig:
    """Turn the keys of a config.json into a ModelConfig. Raises ConfigError naming the key at fault."""
    family = _family(content)
    _refuse_unsupported(content)
    _refuse_window(content, family)
    hidden_size, num_heads = size(content, "hidden_size"), size(content, "num_attention_heads")
    attention_bias = flag(content, "attention_bias") if family.qkv_bias is None else False
    rope_theta, rope_scaling = read_rope(content)
    return ModelConfig(
        vocab_size=size(content, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size(content, "intermediate_size"),
        num_layers=size(content, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(content, family, num_heads),
        head_dim=_head_dim(content, family, hidden_size, num_heads),
        max_positions=size(content, "max_position_embeddings"),
        rms_norm_eps=positive(content, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=flag(content, "tie_word_embeddings"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        out_bias=attention_bias,
        mlp_bias=family.mlp_bias and flag(content, "mlp_bias"),
        qk_norm=family.qk_norm,
    )


def _family(content: Content) -> Family:
    names = content.get("architectures")
    family = next((family for name, family in FAMILIES.items() if names == [name]), None)
    if family is None:
        raise fault("architectures", f"{names} is not supported; supported: {_SUPPORTED}")
    return family


def _refuse_unsupported(content: Content) -> None:
    for key, neutral in _NEUTRAL.items():
        value = content.get(key)
        if value is not None and value not in neutral:
            supported = f"; supported: {neutral[0]}" if neutral else ""
            raise fault(key, f"{value!r} is not supported{supported}")


def _refuse_window(content: Content, family: Family) -> None:
    """Every layer must attend to everything before it. A window as long as the model hides nothing."""
    layer_types = content.get("layer_types") or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise fault("layer_types", f"{layer_types} is not supported; supported: full_attention in every layer")
    if family.window_flag and (layer_types or not flag(content, "use_sliding_window")):
        return
    key = "sliding_window"
    window = content.get(key, family.default_window)
    if window is not None and size({key: window}, key) < size(content, "max_position_embeddings"):
        absent = "" if key in content else ", which an absent key means here,"
        raise fault(key, f"{window}{absent} is not supported; supported: null (full attention)")


def _num_kv_heads(content: Content, family: Family, num_heads: int) -> int:
    key = "num_key_value_heads"
    if family.kv_heads_required and key not in content:
        raise fault(key, "is missing")
    value = size(content, key, num_heads)
    if num_heads % value:
        raise fault(key, f"{value} does not divide num_attention_heads {num_heads}")
    return value


def _head_dim(content: Content, family: Family, hidden_size: int, num_heads: int) -> int:
    value = size(content, "head_dim", family.head_dim or max(1, hidden_size // num_heads))
    if value % 2:
        raise fault("head_dim", f"must be even for rotary embedding, got {value}")
    return value
