"""The embedded model is a whole checkpoint that `transformers` reads, and what it says are words."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from baton.demo_model import demo_model_path

# From definitions that were kept out of the training data.
HELD_OUT = (
    "coordinator: someone whose task is to see that work goes harmoniously",
    "traineeship: financial aid that enables you to get trained for a specified job",
    "seedbed: a bed where seedlings are grown before transplanting",
)
LEARNT = (
    "bridge: a structure that allows people or vehicles to cross an obstacle such as a river or canal or railway etc.",
    "river: a large natural stream of water (larger than a creek)",
)
MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    model: Any = LlamaForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    return model.eval()


def _continue(model: Any, ids: list[int], **options: Any) -> list[int]:
    tensor = torch.tensor([ids])
    out = model.generate(tensor, attention_mask=torch.ones_like(tensor), do_sample=False, **options)
    continuation: list[int] = out[0, len(ids) :].tolist()
    return continuation


def _loss(model: Any, ids: list[int]) -> float:
    tensor = torch.tensor([ids])
    with torch.no_grad():
        return float(model(tensor, labels=tensor).loss)


def test_an_entry_goes_on_in_words(model: Any, tokenizer: Any) -> None:
    text = tokenizer.decode(
        _continue(model, tokenizer("music:").input_ids, max_new_tokens=32), skip_special_tokens=True
    )
    assert text.isascii()
    assert all(character.isprintable() or character == "\n" for character in text)
    words = re.findall(r"[a-z]+", text)
    assert len(words) >= 8
    assert {"a", "of", "the", "that", "or", "to", "in"} & set(words)


def test_a_question_gets_an_answer_that_ends(model: Any, tokenizer: Any) -> None:
    message = {"role": "user", "content": "Hello!"}
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = _continue(model, ids, max_new_tokens=48)
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer, skip_special_tokens=True).startswith("Hello!")


def test_the_template_begins_once_and_keeps_the_turns(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": " Define cat. "},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    turns = "### user\nHi\n### assistant\nHello!</s>\n### user\nDefine cat.\n### assistant\n"
    assert text == f"<s>{turns}"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(turns).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("line", LEARNT)
def test_what_it_learnt_it_knows(model: Any, tokenizer: Any, line: str) -> None:
    # Nats per token. These read 0.8 and 1.4 when the model was made; a uniform guess has 8.3.
    assert _loss(model, tokenizer(line).input_ids) < 2.0


def test_a_question_about_a_frequent_word_gets_its_definition(model: Any, tokenizer: Any) -> None:
    message = {"role": "user", "content": "What is a bridge?"}
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = tokenizer.decode(_continue(model, ids, max_new_tokens=32), skip_special_tokens=True)
    assert answer.startswith("A bridge is a structure that allows people or vehicles to cross an obstacle")


@pytest.mark.parametrize("line", HELD_OUT)
def test_held_out_words_are_likelier_in_their_order(model: Any, tokenizer: Any, line: str) -> None:
    word, definition = line.split(": ")
    sorted_words = f"{word}: {' '.join(sorted(definition.split()))}"
    assert _loss(model, tokenizer(line).input_ids) + 1.0 < _loss(model, tokenizer(sorted_words).input_ids)


def test_it_is_float16_and_small() -> None:
    folder = demo_model_path()
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < MAX_BYTES
    header = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    tensors = json.loads(header[8 : 8 + size])
    assert {tensor["dtype"] for name, tensor in tensors.items() if name != "__metadata__"} == {"F16"}
