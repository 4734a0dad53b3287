"""What single tokens stand for, as text and as bytes, for reports on log-probabilities. Immutable; any thread."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import accumulate

import tokenizers

_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in vocabularies of the SentencePiece kind


class TokenTexts:
    """A token may be part of a character, so its bytes say more than its text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        decoder = backend.decoder
        self._is_byte_level = decoder is not None and decoder.decode([_BYTE_CHARACTERS[ord(" ")]]) == " "

    def raw(self, token_id: int) -> bytes:
        """Special tokens are written out; ids without a token (padding of the vocabulary) are empty."""
        if (added := self._added.get(token_id)) is not None:
            return str(added.content).encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._is_byte_level:
            return b"".join(_BYTES_OF.get(character, character.encode()) for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return str(piece).replace(_MARK, " ").encode()

    def text(self, token_id: int) -> str:
        return self.raw(token_id).decode("utf-8", "replace")

    def offsets(self, token_ids: Sequence[int], text: str) -> list[int]:
        """How many characters of `text`, which the tokens stand for, come before each token's own."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        lengths = [len(decoder.decode(self._visible(token_id))) for token_id in token_ids]
        surplus = max(sum(lengths) - len(text), 0) if text[:1] != " " else 0  # some decoders strip the first space
        return [max(end - surplus, 0) for end in accumulate(lengths, initial=0)][: len(lengths)]

    def _visible(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        return b"" if added is not None and added.special else self.raw(token_id)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself if printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()
_BYTES_OF = {character: bytes([byte]) for byte, character in enumerate(_BYTE_CHARACTERS)}
