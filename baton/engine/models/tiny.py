"""A small random Llama checkpoint in Hugging Face format, for demonstrations, benchmarks and tests.

Written with safetensors, json and tokenizers only; the same seed and shape give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

BOS_TOKEN_ID = 256
EOS_TOKEN_ID = 257
VOCAB_SIZE = 258
SHAPE: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def write_tiny_llama(path: Path, seed: int = 0, std: float = 0.15, **overrides: object) -> Path:
    """Write config.json, model.safetensors, generation_config.json and tokenizer files into `path` and return it.

    `overrides` replace keys of config.json. `std` spreads the weights: larger values give more varied tokens.
    """
    config = {**SHAPE, **overrides}
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", _hf_config(config))
    _write_json(path / "generation_config.json", {"bos_token_id": BOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID})
    save_file(_weights(config, seed, std), str(path / "model.safetensors"), metadata={"format": "pt"})
    _write_tokenizer(path)
    return path


def _hf_config(shape: dict[str, object]) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "torch_dtype": "float32",
        **shape,
    }


def _weights(config: dict[str, object], seed: int, std: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: _weight(name, shape, generator, std) for name, shape in _shapes(config).items()}


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator, std: float) -> torch.Tensor:
    if len(shape) == 1 and name.endswith("norm.weight"):
        return 1.0 + 0.1 * torch.randn(shape, generator=generator)
    return std * torch.randn(shape, generator=generator)


def _shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    def size(key: str) -> int:
        value = config[key]
        if not isinstance(value, int):
            raise TypeError(f"{key} must be an int, got {value!r}")
        return value

    hidden, mlp, vocab = size("hidden_size"), size("intermediate_size"), size("vocab_size")
    q_size = size("num_attention_heads") * size("head_dim")
    kv_size = size("num_key_value_heads") * size("head_dim")
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    if config.get("attention_bias"):
        layer |= {
            f"self_attn.{n}_proj.bias": (s,) for n, s in zip("qkvo", (q_size, kv_size, kv_size, hidden), strict=True)
        }
    if config.get("mlp_bias"):
        layer |= {f"mlp.{n}_proj.bias": (s,) for n, s in (("gate", mlp), ("up", mlp), ("down", hidden))}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(size("num_hidden_layers")):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _write_tokenizer(path: Path) -> None:
    """One token per byte, its id the byte's value; then <s> and </s>."""
    vocab = {char: byte for byte, char in enumerate(_byte_characters())}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    _write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})


def _byte_characters() -> list[str]:
    """The printable character that the byte-level alphabet uses for each byte, in byte order.

    Printable bytes stand for themselves; the others take the characters from U+0100 on, in order.
    """
    alphabet = set(ByteLevel.alphabet())
    others = iter(sorted(char for char in alphabet if ord(char) > 255))
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
