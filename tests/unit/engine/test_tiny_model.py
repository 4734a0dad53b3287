"""The tiny checkpoint is what it says: readable by the tokenizer and the same for the same seed."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from tests.support.tiny_model import EOS_TOKEN_ID, VOCAB_SIZE, make_tiny_llama


def test_every_byte_is_its_own_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(make_tiny_llama(tmp_path) / "tokenizer.json"))
    text = "Grüße, 世界 \n\x00\x7f 😀"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("</s>") == EOS_TOKEN_ID
    assert tokenizer.get_vocab_size() == VOCAB_SIZE


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    first, again, other = (make_tiny_llama(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    weights = [(path / "model.safetensors").read_bytes() for path in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]
