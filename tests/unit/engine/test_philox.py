"""The generator is Philox4x32-10: known answers of the Random123 distribution, and an independent implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.philox import philox4x32

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def run(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    k0, k1 = (torch.tensor(word) for word in key)
    return tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1)))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    assert run(counter, key) == answer


def in_plain_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    for number in range(10):
        k0, k1 = (key[0] + number * 0x9E3779B9) % 2**32, (key[1] + number * 0xBB67AE85) % 2**32
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
    return c0, c1, c2, c3


words = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(counter=st.tuples(words, words, words, words), key=st.tuples(words, words))
def test_equals_exact_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert run(counter, key) == in_plain_integers(counter, key)


def test_broadcasts_over_rows_and_tokens() -> None:
    tokens, positions, zero = torch.arange(5), torch.tensor([[3], [9]]), torch.zeros((2, 1), dtype=torch.int64)
    word = philox4x32((tokens, positions, zero, zero), (torch.tensor([[1], [2]]), zero))[0]
    assert word.shape == (2, 5)
    assert int(word[1, 4]) == in_plain_integers((4, 9, 0, 0), (2, 0))[0]
