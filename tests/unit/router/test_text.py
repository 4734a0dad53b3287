"""Tokens to text: whole characters only, stop strings across token boundaries, the end of an output."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from tokenizers.models import BPE

from baton.common.sampling import SamplingParams
from router.detokenizer import Detokenizer
from router.stop_strings import StopStrings
from router.text import TextAssembler, TextDelta
from router.tokenizer import SpecialTokens, Tokenizer
from router.types import TokenEvent
from tests.unit.router.conftest import EOS_ID, byte_tokenizer

TOKENIZER = byte_tokenizer()
BROKEN = "\N{REPLACEMENT CHARACTER}"


def sentencepiece_tokenizer() -> Tokenizer:
    """Words with a leading space mark, and byte tokens for everything else, as Llama 2 has them."""
    words = ["\u2581the", "\u2581cat", "s"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, SpecialTokens(None, frozenset(), None), len(vocab))


def detokenized(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push(token_id) for token_id in ids] + [detokenizer.flush()]


@settings(deadline=None)
@given(st.text())
def test_byte_tokens_give_the_text_back_in_whole_characters(text: str) -> None:
    pieces = detokenized(TOKENIZER, TOKENIZER.encode(text))
    assert "".join(pieces) == text
    if BROKEN not in text:
        assert all(BROKEN not in piece for piece in pieces)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_decoded_like_the_whole(data: bytes) -> None:
    pieces = detokenized(TOKENIZER, [BYTE_IDS[byte] for byte in data])
    assert "".join(pieces) == TOKENIZER.decode([BYTE_IDS[byte] for byte in data])


def byte_ids() -> list[int]:
    """Token id of every byte value: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    symbols = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    alphabet = sorted(symbols)
    return [alphabet.index(symbol) for symbol in symbols]


BYTE_IDS = byte_ids()


def test_a_character_split_over_tokens_appears_once_it_is_whole() -> None:
    pieces = detokenized(TOKENIZER, TOKENIZER.encode("a\U0001f600b"))
    assert pieces == ["a", "", "", "", "\U0001f600", "b", ""]


def test_byte_fallback_tokens_become_whole_characters() -> None:
    ids = [256, *"\u4f60\u597d".encode(), 257]
    pieces = detokenized(sentencepiece_tokenizer(), ids)
    assert "".join(pieces) == "the\u4f60\u597d cat"
    assert all(BROKEN not in piece for piece in pieces)


def test_the_space_before_the_first_word_survives_with_the_prompt_as_context() -> None:
    assert "".join(detokenized(sentencepiece_tokenizer(), [257, 258], prompt=[256])) == " cats"


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=5), max_size=12))
def test_tokens_of_several_bytes_are_decoded_like_the_whole(tokens: list[bytes]) -> None:
    class Bytes:
        def decode(self, ids: Sequence[int]) -> str:
            return b"".join(tokens[index] for index in ids).decode("utf-8", "replace")

    detokenizer = Detokenizer(Bytes(), [])
    pieces = [detokenizer.push(index) for index in range(len(tokens))] + [detokenizer.flush()]
    assert "".join(pieces) == b"".join(tokens).decode("utf-8", "replace")


def test_a_prompt_that_ends_amid_a_character() -> None:
    """Its own broken byte is not the output's, but a character that the output completes is."""
    half, rest = TOKENIZER.encode("\u4f60")[:1], TOKENIZER.encode("\u4f60")[1:]
    assert "".join(detokenized(TOKENIZER, TOKENIZER.encode("ab"), prompt=[BYTE_IDS[0xFF]])) == "ab"
    assert "".join(detokenized(TOKENIZER, [*rest, *TOKENIZER.encode("b")], prompt=half)) == "\u4f60b"
    assert "".join(detokenized(TOKENIZER, TOKENIZER.encode("b"), prompt=half)) == "b"


def test_bytes_that_can_never_become_a_character_do_not_hold_the_text_back_for_ever() -> None:
    lone = BYTE_IDS[0xFF]
    pieces = detokenized(TOKENIZER, [lone] * 12 + list(TOKENIZER.encode("x")))
    assert "".join(pieces[:8]) != ""
    assert "".join(pieces).endswith("x")


@settings(deadline=None)
@given(
    st.text(alphabet="ab\u4f60"),
    st.lists(st.text(alphabet="ab\u4f60", min_size=1, max_size=3), max_size=3),
    st.booleans(),
    st.data(),
)
def test_stop_strings_cut_where_the_whole_text_would_be_cut(
    text: str, stops: list[str], included: bool, data: st.DataObject
) -> None:
    checker, out, stopped, rest = StopStrings(stops, included=included), "", False, text
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:size], rest[size:]
        safe, stopped = checker.push(piece)
        out += safe
        seen = text[: len(text) - len(rest)]
        assert not any(stop in out for stop in stops) or (stopped and included)
        assert seen.startswith(out)
    out += "" if stopped else checker.flush()
    assert stopped == any(stop in text for stop in stops)
    if not stopped:
        assert out == text
    elif included:
        assert checker.found is not None
        assert out.endswith(checker.found)
        assert not any(stop in out[: len(out) - len(checker.found)] for stop in stops)
    else:
        assert any(text.startswith(out + stop) for stop in stops)


def push(assembler: TextAssembler, text: str, finish: str | None = None) -> TextDelta:
    return assembler.push(TokenEvent(TOKENIZER.encode(text), finish))


def test_a_stop_string_over_two_tokens_ends_the_output_within_the_tokens() -> None:
    assembler = TextAssembler(TOKENIZER, (1,), ["END"], SamplingParams(max_tokens=9))
    assert push(assembler, "xE").text == "x"
    delta = push(assembler, "NDyz")
    assert (delta.text, delta.finish_reason, delta.stopped, len(delta.token_ids)) == ("", "stop", True, 2)


def test_a_partial_stop_string_at_the_end_is_text() -> None:
    assembler = TextAssembler(TOKENIZER, (1,), ["END"], SamplingParams(max_tokens=9))
    push(assembler, "xEN")
    delta = push(assembler, "!", "length")
    assert (delta.text, delta.finish_reason) == ("EN!", "length")
    assembler = TextAssembler(TOKENIZER, (1,), ["END"], SamplingParams(max_tokens=9))
    assert push(assembler, "xEN", "length").text == "xEN"


@pytest.mark.parametrize("stop_ids", [frozenset({EOS_ID}), frozenset({TOKENIZER.encode("q")[0]})])
def test_the_token_that_ends_the_output_counts_but_has_no_text(stop_ids: frozenset[int]) -> None:
    (stop_id,) = stop_ids
    assembler = TextAssembler(TOKENIZER, (1,), [], SamplingParams(max_tokens=9, stop_token_ids=stop_ids))
    delta = assembler.push(TokenEvent((*TOKENIZER.encode("ab"), stop_id), "stop"))
    assert (delta.text, delta.finish_reason, len(delta.token_ids)) == ("ab", "stop", 3)


def test_half_a_character_at_the_end_is_not_lost() -> None:
    assembler = TextAssembler(TOKENIZER, (1,), [], SamplingParams(max_tokens=9))
    delta = assembler.push(TokenEvent(TOKENIZER.encode("a\u4f60")[:2], "length"))
    assert delta.text == "a" + BROKEN
