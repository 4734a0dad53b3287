"""The torch packer against the definition of a segment and of its fingerprints, and the Triton packer against it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from baton.engine.kv_layout import KVLayout
from kv_transfer.fingerprint import Salts, block_fingerprint, block_salts
from kv_transfer.messages import LeaseKey, Segment
from kv_transfer.packing import TorchPacker, make_packer

CPU = torch.device("cpu")
LEASE = LeaseKey(1, 2)
SEGMENT = Segment(1, 3, 5, 8)
BLOCK_IDS = [6, 0, 3]
SALTS = block_salts(LEASE, 9, SEGMENT)


def layout_of(dtype: str) -> KVLayout:
    return KVLayout("model", dtype, block_size=4, num_layers=4, num_kv_heads=2, head_dim=6)


def random_bits(layout: KVLayout, seed: int = 0) -> torch.Tensor:
    """A cache of arbitrary bit patterns, NaNs included."""
    cache = layout.allocate(8, CPU)
    cache.view(torch.uint8).random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return cache


def buffer_for(layout: KVLayout) -> torch.Tensor:
    return torch.zeros(layout.segment_bytes(SEGMENT.num_layers, SEGMENT.num_blocks), dtype=torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pack_gathers_in_segment_order_and_fingerprints_each_block(dtype: str) -> None:
    layout = layout_of(dtype)
    cache, out = random_bits(layout), buffer_for(layout)
    fingerprints = TorchPacker().pack(cache, SEGMENT, BLOCK_IDS, out, SALTS)
    packed = out.view(layout.torch_dtype).view(2, 2, 3, 4, 2, 6)
    assert same_bits(packed, cache[1:3][:, :, BLOCK_IDS])
    for index, fingerprint in enumerate(fingerprints):
        data = packed[:, :, index].contiguous().view(torch.uint8).flatten()
        assert fingerprint == block_fingerprint(bytes(data.tolist()), int(SALTS[index]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_unpack_restores_the_bits_and_touches_nothing_else(dtype: str) -> None:
    layout = layout_of(dtype)
    source, target, data = random_bits(layout), random_bits(layout, seed=1), buffer_for(layout)
    before, target_ids = target.clone(), [2, 7, 4]
    expected = TorchPacker().pack(source, SEGMENT, BLOCK_IDS, data, SALTS)
    assert TorchPacker().unpack(target, SEGMENT, target_ids, data, SALTS, expected)
    assert same_bits(target[1:3][:, :, target_ids], source[1:3][:, :, BLOCK_IDS])
    before[1:3][:, :, target_ids] = source[1:3][:, :, BLOCK_IDS]
    assert same_bits(target, before)


@pytest.mark.parametrize("position", [0, 100, -1])
def test_one_flipped_bit_scatters_nothing(position: int, caplog: pytest.LogCaptureFixture) -> None:
    layout = layout_of("float16")
    cache, data = random_bits(layout), buffer_for(layout)
    expected = TorchPacker().pack(cache, SEGMENT, BLOCK_IDS, data, SALTS)
    data[position] ^= 4
    before = cache.clone()
    assert not TorchPacker().unpack(cache, SEGMENT, [1, 2, 4], data, SALTS, expected)
    assert same_bits(cache, before)
    assert "1 of 3 blocks of a chunk do not match" in caplog.text


def test_a_chunk_with_another_number_of_fingerprints_does_not_verify() -> None:
    layout = layout_of("float32")
    cache, data = random_bits(layout), buffer_for(layout)
    expected = TorchPacker().pack(cache, SEGMENT, BLOCK_IDS, data, SALTS)
    for wrong in (expected[:-1], [*expected, 0], []):
        assert not TorchPacker().unpack(cache, SEGMENT, BLOCK_IDS, data, SALTS, wrong)


def test_exchanged_blocks_do_not_verify() -> None:
    layout = layout_of("float32")
    cache, data = random_bits(layout), buffer_for(layout)
    expected = TorchPacker().pack(cache, SEGMENT, BLOCK_IDS, data, SALTS)
    TorchPacker().pack(cache, SEGMENT, BLOCK_IDS[::-1], data, SALTS)
    assert not TorchPacker().unpack(cache, SEGMENT, BLOCK_IDS, data, SALTS, expected)


@pytest.mark.parametrize(
    ("segment", "block_ids", "salts"),
    [
        (SEGMENT._replace(layer_end=5, layer_start=3), BLOCK_IDS, SALTS),
        (SEGMENT, [0, 1, 8], SALTS),
        (SEGMENT, [0, 1, -1], SALTS),
        (SEGMENT, [0, 1], SALTS),
        (SEGMENT, BLOCK_IDS, SALTS[:2]),
        (SEGMENT._replace(layer_end=4), BLOCK_IDS, SALTS),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(segment: Segment, block_ids: list[int], salts: Salts) -> None:
    layout = layout_of("float32")
    with pytest.raises(ValueError, match=r"Segment|block ids"):
        TorchPacker().pack(random_bits(layout), segment, block_ids, buffer_for(layout), salts)


def test_the_cpu_takes_the_torch_packer() -> None:
    assert isinstance(make_packer(CPU), TorchPacker)


def test_the_triton_packer_gives_the_same_bits() -> None:
    layout = layout_of("float16")
    expected = TorchPacker().pack(random_bits(layout), SEGMENT, BLOCK_IDS, buffer_for(layout), SALTS)
    # Triton decides at import whether it interprets, so this needs a process of its own.
    run = subprocess.run(
        [sys.executable, "-m", "tests.transfer.interpreted_packer"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    fingerprints, ok, bad, moved, *others = json.loads(run.stdout)
    assert [fingerprints, ok, bad, moved] == [expected, True, False, True]
    # Warming up left the cache as it was and launched both kernels; no later launch needs another.
    assert others == [True, [True, False], 2, True, True]
