"""Writes the demo model as a Hugging Face checkpoint folder; `train.py` calls `write_checkpoint`.

The tokenizer's side (special tokens, chat template) is used by `prepare_data.py` too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from model import Shape
from safetensors.torch import save_file

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
# The conversations of documents.py have this form. A newline that follows a block is written as an expression, since
# transformers' jinja drops the first newline after a block.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "### {{ message['role'] }}\n{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}### assistant\n{% endif %}"
)


def write_checkpoint(folder: Path, shape: Shape, weights: dict[str, torch.Tensor], tokenizer: Path) -> None:
    """config.json, generation_config.json, tokenizer files and model.safetensors (float16).

    `weights` have the names of LlamaForCausalLM. Raises ValueError when a weight does not fit float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: weight.detach().to("cpu", torch.float16).contiguous() for name, weight in weights.items()}
    unfit = [name for name, weight in halves.items() if not bool(torch.isfinite(weight).all())]
    if unfit:
        raise ValueError(f"not finite in float16: {', '.join(unfit)}")
    file = folder / "model.safetensors"
    save_file(halves, str(file), metadata={"format": "pt"})
    file.chmod(0o644)
    _write_json(folder / "config.json", _config(shape))
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, **sampling})
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(shape))


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "initializer_range": 0.02,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }


def _tokenizer_config(shape: Shape) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
