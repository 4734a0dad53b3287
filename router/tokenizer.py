"""Text to token ids and back, for the model in one directory in Hugging Face format. Workers never see text.

Loads tokenizer.json, tokenizer_config.json, generation_config.json and config.json once, at start. Immutable
afterwards, so it may be used from any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from baton.common.errors import ConfigError, InvalidRequest
from router.model_files import read_json
from router.token_text import TokenTexts


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`add_bos` None: whatever tokenizer.json's post-processor does."""

    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool | None


class Tokenizer:
    """`vocab_size` is the model's: ids at or above it are refused. `texts` knows single tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eos_ids = special.eos_ids
        self.texts = TokenTexts(backend)
        self._backend = backend
        self._special = special
        self._longest_token = max((len(token) for token in backend.get_vocab()), default=1)

    @classmethod
    def load(cls, model: Path) -> Tokenizer:
        """Raises ConfigError naming the file that is missing or wrong."""
        file = model / "tokenizer.json"
        if not file.is_file():
            raise ConfigError("model", f"{file} does not exist")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001  (the library raises nothing more specific)
            raise ConfigError("model", f"{file} cannot be read: {error}") from None
        backend.no_truncation()
        backend.no_padding()
        config = read_json(model / "config.json")
        vocab_size = config.get("vocab_size")
        size = vocab_size if isinstance(vocab_size, int) else backend.get_vocab_size()
        return cls(backend, _special_tokens(model, config, backend), size)

    def min_tokens(self, text: str) -> int:
        """A lower bound, for free, of how many tokens `text` has: no token is longer than the longest one."""
        return len(text) // self._longest_token

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> tuple[int, ...]:
        """Token ids of a prompt, with BOS where the model wants one, and never two of them.

        Without `add_special_tokens` just those of the text, in which special tokens may be written out. More than
        `max_tokens` are counted, but not listed: raises InvalidRequest.

        Long texts take a while: call it off the event loop, which it does not block (a batch of one releases the GIL,
        a single text would not).
        """
        special = self._special
        by_file = add_special_tokens and special.add_bos is None
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=by_file)
        if max_tokens is not None and len(encoding) > max_tokens:
            message = f"the text has {len(encoding)} tokens; this server's limit is {max_tokens}"
            raise InvalidRequest(message, "prompt", "context_length_exceeded")
        ids: list[int] = encoding.ids
        if not add_special_tokens:
            return tuple(ids)
        bos = special.bos_id
        if special.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        if bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        return tuple(ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids without a token of their own (padding of the vocabulary) are skipped."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def entry(self, token_id: int) -> str:
        """A token as the vocabulary writes it; empty where there is none."""
        return self._backend.id_to_token(token_id) or ""


def _special_tokens(model: Path, config: dict[str, object], backend: tokenizers.Tokenizer) -> SpecialTokens:
    tokenizer_config = read_json(model / "tokenizer_config.json")
    special_map = read_json(model / "special_tokens_map.json")
    generation = read_json(model / "generation_config.json")

    def token_id(name: str) -> int | None:
        token = tokenizer_config.get(name) or special_map.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return backend.token_to_id(token) if isinstance(token, str) else None

    bos_id = token_id("bos_token")
    if bos_id is None:
        bos_id = next(iter(_ids(generation.get("bos_token_id")) or _ids(config.get("bos_token_id"))), None)
    eos_ids = _ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id"))
    eos_id = token_id("eos_token")
    if not eos_ids and eos_id is not None:
        eos_ids = [eos_id]
    add_bos = tokenizer_config.get("add_bos_token")
    return SpecialTokens(bos_id, frozenset(eos_ids), add_bos if isinstance(add_bos, bool) else None)


def _ids(value: object) -> list[int]:
    """`eos_token_id` is an id, a list of ids, or absent."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
