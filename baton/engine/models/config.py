"""What Baton needs to know of a checkpoint's config.json, and refusal of what it does not support.

A setting that would change the model's output and is not implemented is an error that names its key: a wrong answer is
worse than none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.common.errors import ConfigError

ARCHITECTURE = "LlamaForCausalLM"
REFUSED_UNLESS_NULL = ("sliding_window", "quantization_config", "layer_types", "auto_map")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a Llama. Sizes count elements."""

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
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

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
    _refuse_unsupported(content)
    hidden_size = _size(content, "hidden_size")
    num_heads = _size(content, "num_attention_heads")
    num_kv_heads = _size(content, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise _error("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
    head_dim = _size(content, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise _error("head_dim", f"must be even for rotary embedding, got {head_dim}")
    return ModelConfig(
        vocab_size=_size(content, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(content, "intermediate_size"),
        num_layers=_size(content, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=_size(content, "max_position_embeddings"),
        rms_norm_eps=_positive(content, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(content),
        tie_word_embeddings=_flag(content, "tie_word_embeddings"),
        attention_bias=_flag(content, "attention_bias"),
        mlp_bias=_flag(content, "mlp_bias"),
    )


def _refuse_unsupported(content: Mapping[str, object]) -> None:
    if content.get("architectures") != [ARCHITECTURE]:
        raise _error("architectures", f"{content.get('architectures')} is not supported; supported: {ARCHITECTURE}")
    if content.get("hidden_act", "silu") != "silu":
        raise _error("hidden_act", f"{content['hidden_act']!r} is not supported; supported: silu")
    if content.get("pretraining_tp", 1) != 1:
        raise _error("pretraining_tp", f"{content['pretraining_tp']} is not supported; supported: 1")
    if content.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _error("partial_rotary_factor", f"{content['partial_rotary_factor']} is not supported; supported: 1")
    for key in REFUSED_UNLESS_NULL:
        if content.get(key) is not None:
            raise _error(key, "is not supported")


def _rope_theta(content: Mapping[str, object]) -> float:
    """`rope_theta` beside `rope_scaling`, or both inside `rope_parameters`, as newer checkpoints write it."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise _error(key, f"must be an object, got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise _error(key, f"type {kind!r} is not supported; supported: default")
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise _error(f"{key}.partial_rotary_factor", f"{rope['partial_rotary_factor']} is not supported")
        if "rope_theta" in rope:
            return _positive(rope, "rope_theta", None, f"{key}.")
    return _positive(content, "rope_theta", 10000.0)


def _size(content: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = content.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _error(key, "is missing" if value is None else f"must be a positive integer, got {value!r}")
    return value


def _positive(content: Mapping[str, object], key: str, default: float | None, prefix: str = "") -> float:
    value = content.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _error(prefix + key, f"must be a positive number, got {value!r}")
    return float(value)


def _flag(content: Mapping[str, object], key: str) -> bool:
    value = content.get(key, False)
    if not isinstance(value, bool):
        raise _error(key, f"must be true or false, got {value!r}")
    return value


def _error(key: str, message: str) -> ConfigError:
    return ConfigError(f"config.json: {key}", message)
