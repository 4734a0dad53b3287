"""The definition of fingerprints and salts, and that the tensor arithmetic agrees with Python's integers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.fingerprint import (
    block_fingerprint,
    block_salts,
    signed,
    splitmix64,
    splitmix64_tensor,
    unsigned,
    word_multipliers,
)
from kv_transfer.messages import LeaseKey, Segment

U64 = st.integers(0, (1 << 64) - 1)
LEASE = LeaseKey(7, 3)
SEGMENT = Segment(2, 5, 10, 14)


def test_splitmix64_gives_the_published_sequence() -> None:
    gamma = 0x9E3779B97F4A7C15
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [splitmix64(i * gamma % (1 << 64)) for i in range(4)] == expected


@given(st.lists(U64, min_size=1, max_size=20))
def test_tensor_and_python_agree(values: list[int]) -> None:
    tensor = torch.tensor([signed(value) for value in values], dtype=torch.int64)
    assert [unsigned(value) for value in splitmix64_tensor(tensor).tolist()] == [splitmix64(v) for v in values]


@given(U64)
def test_signed_and_unsigned_are_inverse(value: int) -> None:
    assert -(1 << 63) <= signed(value) < 1 << 63
    assert unsigned(signed(value)) == value


def test_multipliers_are_odd_and_distinct() -> None:
    multipliers = word_multipliers(4096, torch.device("cpu"))
    assert bool((multipliers & 1).all())
    assert len(set(multipliers.tolist())) == 4096
    assert unsigned(int(multipliers[5])) == splitmix64(5) | 1


def test_each_part_of_the_name_changes_the_salt() -> None:
    base = block_salts(LEASE, 4, SEGMENT).tolist()
    assert len(base) == len(set(base)) == 4
    others = [
        block_salts(LeaseKey(8, 3), 4, SEGMENT),
        block_salts(LeaseKey(7, 4), 4, SEGMENT),
        block_salts(LEASE, 5, SEGMENT),
        block_salts(LEASE, 4, SEGMENT._replace(layer_start=1)),
        block_salts(LeaseKey(3, 7), 4, SEGMENT),
    ]
    for other in others:
        assert not set(base) & set(other.tolist())


def test_a_salt_follows_the_logical_block_not_its_place_in_the_segment() -> None:
    whole = block_salts(LEASE, 4, SEGMENT)
    assert block_salts(LEASE, 4, SEGMENT._replace(block_start=12)).tolist() == whole[2:].tolist()


@given(st.binary(min_size=8, max_size=64).filter(lambda data: len(data) % 4 == 0), U64, st.integers(0, 511))
def test_any_flipped_bit_changes_the_fingerprint(data: bytes, salt: int, bit: int) -> None:
    flipped = bytearray(data)
    flipped[bit // 8 % len(data)] ^= 1 << bit % 8
    assert block_fingerprint(bytes(flipped), salt) != block_fingerprint(data, salt)


def test_swapped_words_change_the_fingerprint() -> None:
    assert block_fingerprint(b"aaaabbbb", 1) != block_fingerprint(b"bbbbaaaa", 1)


def test_words_are_unsigned() -> None:
    multiplier = splitmix64(0) | 1
    assert block_fingerprint(b"\xff\xff\xff\xff", 0) == splitmix64(0xFFFFFFFF * multiplier % (1 << 64))
