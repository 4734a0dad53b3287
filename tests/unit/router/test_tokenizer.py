"""Loading a tokenizer from a model directory: BOS once, EOS from the right place, errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from baton.common.errors import ConfigError
from router.tokenizer import Tokenizer
from tests.support.tiny_model import BOS_TOKEN_ID, EOS_TOKEN_ID, VOCAB_SIZE, make_tiny_llama

BOS, EOS = 256, 257


def write_model(path: Path, template: bool = False, /, **files: object) -> Path:
    """tokenizer.json with <s> and </s>, and the given json files (names without .json)."""
    vocab = {token: index for index, token in enumerate(sorted(ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in ("<s>", "</s>")])
    if template:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_the_tiny_checkpoint_loads_and_round_trips(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_tiny_llama(tmp_path))
    ids = tokenizer.encode("h\u00e9llo \U0001f600")
    assert tokenizer.decode(ids) == "h\u00e9llo \U0001f600"
    assert tokenizer.eos_ids == {EOS_TOKEN_ID}
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert max(ids) <= BOS_TOKEN_ID


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [EOS, 7]}, "config": {"eos_token_id": 3}}, {EOS, 7}),
        ({"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": 3}}, {7}),
        ({"generation_config": {}, "config": {"eos_token_id": 3}}, {3}),
        ({"tokenizer_config": {"eos_token": "</s>"}}, {EOS}),
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}}}, {EOS}),
        ({"special_tokens_map": {"eos_token": "</s>"}}, {EOS}),
        ({}, set()),
    ],
)
def test_eos_ids_come_from_the_generation_config_first(
    tmp_path: Path, files: dict[str, object], expected: set[int]
) -> None:
    assert Tokenizer.load(write_model(tmp_path, False, **files)).eos_ids == expected


@pytest.mark.parametrize(
    ("template", "add_bos", "text", "num_bos"),
    [
        (True, None, "ab", 1),
        (True, None, "<s>ab", 1),
        (True, True, "ab", 1),
        (True, False, "ab", 0),
        (False, None, "ab", 0),
        (False, True, "ab", 1),
        (False, True, "<s>ab", 1),
        (False, True, "", 1),
    ],
)
def test_bos_is_added_as_the_model_wants_and_never_twice(
    tmp_path: Path, template: bool, add_bos: bool | None, text: str, num_bos: int
) -> None:
    config: dict[str, object] = {"bos_token": "<s>"}
    if add_bos is not None:
        config["add_bos_token"] = add_bos
    ids = Tokenizer.load(write_model(tmp_path, template, tokenizer_config=config)).encode(text)
    assert ids[:num_bos] == (BOS,) * num_bos
    assert ids.count(BOS) == num_bos


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(model / "tokenizer.json"))
    assert len(Tokenizer.load(model).encode("abcdefgh")) == 8


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_the_lower_bound_never_exceeds_the_true_count(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_model(tmp_path))
    for text in ("", "a", "abc" * 50):
        assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text))
