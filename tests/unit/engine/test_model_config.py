"""config.json: what is read, and what is refused by name rather than served wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.common.errors import ConfigError
from baton.engine.models.config import load_model_config, parse_model_config

GOOD: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}


def test_defaults_are_those_of_the_format() -> None:
    config = parse_model_config(GOOD)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.rms_norm_eps) == (6, 16, 10000.0, 1e-6)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert (config.q_size, config.kv_size) == (96, 96)


def test_null_is_a_default() -> None:
    nulls = dict.fromkeys(("head_dim", "num_key_value_heads", "rope_scaling", "sliding_window", "rope_theta"))
    assert parse_model_config({**GOOD, **nulls}) == parse_model_config(GOOD)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5}},
    ],
)
def test_both_forms_of_rope(rope: dict[str, object]) -> None:
    assert parse_model_config({**GOOD, **rope}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["MistralForCausalLM"]),
        ("architectures", None),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", []),
        ("sliding_window", 4096),
        ("quantization_config", {"bits": 4}),
        ("pretraining_tp", 2),
        ("partial_rotary_factor", 0.5),
        ("vocab_size", None),
        ("vocab_size", 0),
        ("hidden_size", 96.0),
        ("num_hidden_layers", True),
        ("num_key_value_heads", 4),
        ("head_dim", 15),
        ("rope_theta", -1),
        ("rope_theta", float("inf")),
        ("rms_norm_eps", "small"),
        ("attention_bias", "yes"),
        ("max_position_embeddings", "128"),
    ],
)
def test_the_key_at_fault_is_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse_model_config({**GOOD, key: value})
    assert error.value.key == f"config.json: {key}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_model_config(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert load_model_config(tmp_path) == parse_model_config(GOOD)
