"""Tiny checkpoints for tests."""

from __future__ import annotations

from pathlib import Path

from baton.engine.models.tiny import BOS_TOKEN_ID, EOS_TOKEN_ID, VOCAB_SIZE, write_tiny_llama

__all__ = ["BOS_TOKEN_ID", "EOS_TOKEN_ID", "VOCAB_SIZE", "make_tiny_llama"]


def make_tiny_llama(path: Path, **overrides: object) -> Path:
    """A random Llama in Hugging Face format (3 layers, hidden 64, byte-level vocabulary of 258); returns `path`.

    `overrides` replace keys of config.json, or `seed` and `std` of the random weights.
    """
    seed, std = overrides.pop("seed", 0), overrides.pop("std", 0.15)
    assert isinstance(seed, int)
    assert isinstance(std, float)
    return write_tiny_llama(path, seed, std, **overrides)
