"""The 64-bit fingerprint of one block in one segment, and the salt that ties it to its place.

Owns the definition; the pack kernels compute the same bits. With the block's data in segment order (layer, K/V, slot,
head, dim) read as little-endian unsigned 32-bit words w_0, w_1, ...:

    h = sum of w_j * (splitmix64(j) | 1)  mod 2^64        fingerprint = splitmix64(h ^ salt)

The salt is drawn from lease, generation, sequence number, first layer and logical block, so that data which is intact
but belongs to another lease, chunk or place does not verify. Values travel as unsigned Python integers, salts are
arrays of them; tensors hold the same bits as int64, whose arithmetic wraps modulo 2^64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kv_transfer.messages import LeaseKey, Segment

Salts = npt.NDArray[np.uint64]  # [num_blocks]
MASK = (1 << 64) - 1
WORD_BYTES = 4
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(value: int) -> int:
    """The output function of the SplitMix64 generator for the state `value`: a bijection on 64-bit integers."""
    z = (value + _GAMMA) & MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & MASK
    return z ^ (z >> 31)


def splitmix64_tensor(values: torch.Tensor) -> torch.Tensor:
    """`splitmix64` of every element of an int64 tensor."""
    z = values + signed(_GAMMA)
    z = (z ^ _shift_right(z, 30)) * signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    # int64's own shift copies the sign bit; the mask makes it logical.
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value


def unsigned(value: int) -> int:
    """The unsigned 64-bit integer with the bits of an int64."""
    return value & MASK


def block_salts(lease: LeaseKey, seq: int, segment: Segment) -> Salts:
    """One salt per block of the segment, in block order."""
    chunk = 0
    for value in (lease.lease, lease.generation, seq, segment.layer_start):
        chunk = splitmix64(chunk ^ value)
    blocks = np.arange(segment.block_start, segment.block_end, dtype=np.uint64)
    return _splitmix64_array(blocks ^ np.uint64(chunk))


def _splitmix64_array(values: Salts) -> Salts:
    z = values + np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    mixed: Salts = z ^ (z >> np.uint64(31))
    return mixed


def word_multipliers(num_words: int, device: torch.device) -> torch.Tensor:
    """splitmix64(j) | 1 for each word j of a block: int64 [num_words]."""
    return splitmix64_tensor(torch.arange(num_words, dtype=torch.int64, device=device)) | 1


def block_fingerprint(data: bytes, salt: int) -> int:
    """The definition, word by word: `data` is one block's bytes in segment order. For tests and tools."""
    words = (int.from_bytes(data[i : i + WORD_BYTES], "little") for i in range(0, len(data), WORD_BYTES))
    total = sum(word * (splitmix64(j) | 1) for j, word in enumerate(words)) & MASK
    return splitmix64(total ^ salt)
