"""A model shape as a directory that `baton serve --load-format random` takes: config.json and a tokenizer to match.

The tokenizer has one token per byte, so any text can be sent, and made-up words for the other ids, so that every token
that random weights draw has a text and costs what detokenising costs. Called by `baton model shape`.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from baton.common.errors import ConfigError
from benchmarks.engine.shapes import SHAPES, write_shape


def write_servable(name: str, directory: Path) -> Path:
    """Write config.json and tokenizer.json of a shape into `directory`. Raises ConfigError for an unknown name."""
    if name not in SHAPES:
        raise ConfigError("shape", f"{name!r} is none of {', '.join(SHAPES)}")
    directory.mkdir(parents=True, exist_ok=True)
    write_shape(name, directory)
    vocab_size = SHAPES[name]["vocab_size"]
    assert isinstance(vocab_size, int)
    _tokenizer(vocab_size).save(str(directory / "tokenizer.json"), pretty=False)
    return directory


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Ids below 256 are the byte-level alphabet in its own order, the others words of no language."""
    characters = sorted(ByteLevel.alphabet())
    words = [f"\u0120w{number}" for number in range(len(characters), vocab_size)]
    vocab = {token: number for number, token in enumerate([*characters, *words][:vocab_size])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer
