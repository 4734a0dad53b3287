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
    assert (config.tie_word_embeddings, config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm) == (
        False,
    ) * 5
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


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("key", "value", "at"),
    [
        ("architectures", ["MixtralForCausalLM"], ""),
        ("architectures", ["LlamaForCausalLM", "MistralForCausalLM"], ""),
        ("architectures", [["LlamaForCausalLM"]], ""),
        ("architectures", None, ""),
        ("hidden_act", "gelu", ""),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 8.0}, ".rope_type"),
        ("rope_scaling", {"rope_type": ["llama3"]}, ".rope_type"),
        ("rope_scaling", {"type": "linear"}, ".factor"),
        ("rope_scaling", {"factor": 2.0}, ".factor"),
        ("rope_scaling", {**LLAMA3, "high_freq_factor": 1.0}, ".high_freq_factor"),
        ("rope_scaling", {**LLAMA3, "low_freq_factor": None}, ".low_freq_factor"),
        ("rope_scaling", {**LLAMA3, "original_max_position_embeddings": 0.5}, ".original_max_position_embeddings"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, ".rope_type"),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}, ".full_attention"),
        ("rope_parameters", {"rope_theta": 1e4, "mrope_section": [8, 12, 12]}, ".mrope_section"),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, ".partial_rotary_factor"),
        ("rope_parameters", [], ""),
        ("sliding_window", 100, ""),
        ("sliding_window", "all", ""),
        ("layer_types", ["full_attention", "sliding_attention"], ""),
        ("layer_types", "sliding_attention", ""),
        ("quantization_config", {"bits": 4}, ""),
        ("num_experts", 8, ""),
        ("final_logit_softcapping", 30.0, ""),
        ("pretraining_tp", 2, ""),
        ("partial_rotary_factor", 0.5, ""),
        ("vocab_size", None, ""),
        ("vocab_size", 0, ""),
        ("hidden_size", 96.0, ""),
        ("num_hidden_layers", True, ""),
        ("num_key_value_heads", 4, ""),
        ("head_dim", 15, ""),
        ("rope_theta", -1, ""),
        ("rope_theta", float("inf"), ""),
        ("rms_norm_eps", "small", ""),
        ("attention_bias", "yes", ""),
        ("max_position_embeddings", "128", ""),
    ],
)
def test_the_key_at_fault_is_named(key: str, value: object, at: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_model_config({**GOOD, key: value})
    assert error.value.key == f"config.json: {key}{at}"


def of(architecture: str, **keys: object) -> dict[str, object]:
    return {**GOOD, "architectures": [architecture], "num_key_value_heads": 2, **keys}


MISTRAL, QWEN2, QWEN3 = "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"


def test_what_a_family_says_beyond_its_keys() -> None:
    llama, mistral = parse_model_config(of("LlamaForCausalLM")), parse_model_config(of(MISTRAL, sliding_window=None))
    qwen2, qwen3 = parse_model_config(of(QWEN2, attention_bias=True)), parse_model_config(of(QWEN3))
    assert [c.qkv_bias for c in (llama, mistral, qwen2, qwen3)] == [False, False, True, False]
    assert [c.qk_norm for c in (llama, mistral, qwen2, qwen3)] == [False, False, False, True]
    assert [c.head_dim for c in (llama, mistral, qwen2, qwen3)] == [16, 16, 16, 128]
    assert not qwen2.out_bias
    assert parse_model_config(of(QWEN3, attention_bias=True)).out_bias


@pytest.mark.parametrize(
    ("architecture", "keys", "supported"),
    [
        (MISTRAL, {"max_position_embeddings": 8192}, False),  # absent means 4096 there
        (MISTRAL, {"sliding_window": None}, True),
        (MISTRAL, {"sliding_window": 127}, False),
        (MISTRAL, {"sliding_window": 128}, True),
        (QWEN2, {"sliding_window": 64}, True),
        (QWEN2, {"sliding_window": 64, "use_sliding_window": False}, True),
        (QWEN2, {"sliding_window": 64, "use_sliding_window": True}, False),
        (QWEN3, {"sliding_window": 64, "use_sliding_window": True}, False),
        (QWEN3, {"use_sliding_window": True, "sliding_window": None}, True),
        (QWEN3, {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, True),
        ("LlamaForCausalLM", {"sliding_window": 64}, False),
    ],
)
def test_a_sliding_window_is_refused_where_it_is_in_use(
    architecture: str, keys: dict[str, object], supported: bool
) -> None:
    content = of(architecture, **keys)
    if supported:
        parse_model_config(content)
    else:
        with pytest.raises(ConfigError, match="full attention") as error:
            parse_model_config(content)
        assert error.value.key == "config.json: sliding_window"


@pytest.mark.parametrize("architecture", [MISTRAL, QWEN2, QWEN3])
def test_a_default_that_differs_between_families_is_not_guessed(architecture: str) -> None:
    content = of(architecture, sliding_window=None)
    del content["num_key_value_heads"]
    with pytest.raises(ConfigError, match="num_key_value_heads: is missing"):
        parse_model_config(content)
    assert parse_model_config({**content, "num_key_value_heads": None}).num_kv_heads == 6


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_model_config(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert load_model_config(tmp_path) == parse_model_config(GOOD)
