"""Pack and unpack move exactly the named blocks, with the defined fingerprints, bit for bit."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels import kv_pack
from baton.engine.kernels.kv_pack import PackTables
from kv_transfer.fingerprint import splitmix64_tensor, word_multipliers
from tests.kernels.reference import fingerprint

LAYERS = (1, 3)


def make_cache(dtype: torch.dtype, device: torch.device, num_blocks: int = 6, block_size: int = 16) -> torch.Tensor:
    return torch.randn(3, 2, num_blocks, block_size, 3, 8).to(dtype).to(device)


def as_bytes(cache: torch.Tensor, block_ids: list[int]) -> list[bytes]:
    """Each block's data of LAYERS, in segment order."""
    blocks = cache[LAYERS[0] : LAYERS[1]].cpu()
    return [blocks[:, :, block].contiguous().view(torch.uint8).numpy().tobytes() for block in block_ids]


def unsigned(fingerprints: torch.Tensor) -> list[int]:
    return [value % 2**64 for value in fingerprints.tolist()]


def tables_of(block_ids: list[int], salts: list[int], device: torch.device) -> PackTables:
    """With room for more than is used; on a GPU the fingerprints go to memory of the host."""
    rows = torch.full((2, 32), 10**15, dtype=torch.int64, device=device)
    rows[:, : len(salts)] = torch.tensor([block_ids, salts], dtype=torch.int64)
    sums = torch.zeros(32, dtype=torch.int64, device=device)
    return PackTables(rows[0], rows[1], sums, torch.full((32,), 99, pin_memory=device.type == "cuda"))


def found_in(tables: PackTables, count: int) -> list[int]:
    """The fingerprints; no more were written, and the sums are as they were."""
    if tables.sums.is_cuda:
        torch.cuda.synchronize()
    assert not tables.sums.any()
    assert (tables.fingerprints[count:] == 99).all()
    return unsigned(tables.fingerprints[:count])


def run_pack(cache: torch.Tensor, block_ids: list[int], salts: list[int]) -> tuple[torch.Tensor, list[int]]:
    tables = tables_of(block_ids, salts, cache.device)
    size = sum(len(data) for data in as_bytes(cache, block_ids))
    out = torch.full((size,), 0xEE, dtype=torch.uint8, device=cache.device)
    kv_pack.pack(cache, *LAYERS, len(block_ids), tables, out)
    return out, found_in(tables, len(block_ids))


def run_unpack(cache: torch.Tensor, block_ids: list[int], salts: list[int], data: torch.Tensor) -> list[int]:
    tables = tables_of(block_ids, salts, cache.device)
    kv_pack.unpack(cache, *LAYERS, len(block_ids), tables, data)
    return found_in(tables, len(block_ids))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_pack_gathers_and_fingerprints(name: str, device: torch.device) -> None:
    """bfloat16 too, in the interpreter as well: only bits are moved."""
    cache = make_cache(getattr(torch, name), device)
    block_ids, salts = [4, 0, 5], [7, -1, 2**62]
    out, found = run_pack(cache, block_ids, salts)
    assert torch.equal(out.view(cache.dtype).view(2, 2, 3, 16, 3, 8), cache[1:3][:, :, block_ids])
    assert found == [
        fingerprint(data, salt % 2**64) for data, salt in zip(as_bytes(cache, block_ids), salts, strict=True)
    ]


def test_fingerprints_equal_the_torch_reference(device: torch.device) -> None:
    """More blocks than a program takes, planes longer than a program: every partial sum must arrive."""
    cache = make_cache(torch.float32, device, num_blocks=12, block_size=64)
    block_ids, salts = list(range(11, 0, -1)), list(range(11))
    out, found = run_pack(cache, block_ids, salts)
    words = out.view(torch.int32).view(4, 11, -1).transpose(0, 1).flatten(1).cpu().long() & 0xFFFFFFFF
    totals = (words * word_multipliers(words.shape[1], torch.device("cpu"))).sum(1)
    assert found == unsigned(splitmix64_tensor(totals ^ torch.tensor(salts)))


def test_unpack_scatters_and_fingerprints(device: torch.device) -> None:
    source = make_cache(torch.float16, device)
    data, sent = run_pack(source, [4, 0], [3, 9])
    target = torch.full_like(source, torch.nan)
    assert run_unpack(target, [1, 5], [3, 9], data) == sent
    assert torch.equal(target[1:3][:, :, [1, 5]], source[1:3][:, :, [4, 0]])
    assert target[0].isnan().all()
    assert target[:, :, [0, 2, 3, 4]].isnan().all()


def test_a_flipped_bit_a_swap_and_another_salt_show(device: torch.device) -> None:
    source = make_cache(torch.float16, device)
    data, sent = run_pack(source, [4, 0], [3, 9])

    def received(bytes_: torch.Tensor, salts: list[int]) -> list[int]:
        return run_unpack(torch.zeros_like(source), [1, 5], salts, bytes_)

    flipped = data.clone()
    flipped[5] ^= 0x80
    assert received(flipped, [3, 9])[0] != sent[0]
    assert received(flipped, [3, 9])[1] == sent[1]
    swapped = data.view(torch.int32).clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert received(swapped.view(torch.uint8), [3, 9])[0] != sent[0]
    assert received(data, [9, 3])[0] != sent[0]


def test_nan_blocks_move_bit_for_bit(device: torch.device) -> None:
    cache = make_cache(torch.float32, device)
    cache[1, 0, 2] = torch.nan
    cache.view(torch.int32)[1, 0, 2, 0, 0, 0] = 0x7FA00001  # a NaN with a payload
    out, _ = run_pack(cache, [2], [0])
    assert out.view(torch.int32)[0] == 0x7FA00001


def test_tables_serve_one_chunk_after_the_other(device: torch.device) -> None:
    """Also from another layer on, and of other lengths: nothing of the first chunk is left in the second."""
    cache = make_cache(torch.float32, device)
    tables, again = tables_of([4, 0], [3, 9], device), tables_of([4, 0, 2], [3, 9, 5], device)
    long = torch.zeros(3 * 3 * 2 * 16 * 3 * 8 * 4, dtype=torch.uint8, device=device)
    kv_pack.pack(cache, 0, 3, 2, tables, long[: 2 * long.numel() // 3])
    for used in (tables, again):
        used.block_ids[:3], used.salts[:3] = again.block_ids[:3].clone(), again.salts[:3].clone()
        kv_pack.pack(cache, 2, 3, 3, used, long[: long.numel() // 3])
    assert found_in(tables, 3) == found_in(again, 3)


def test_no_blocks(device: torch.device) -> None:
    cache = make_cache(torch.float32, device)
    tables = tables_of([], [], device)
    kv_pack.pack(cache, *LAYERS, 0, tables, torch.zeros(0, dtype=torch.uint8, device=device))
    assert found_in(tables, 0) == []


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    cache = make_cache(torch.float32, device)
    tables = tables_of([1], [1], device)
    right = 2 * 2 * 16 * 3 * 8 * 4
    for size in (right - 4, right + 4):
        with pytest.raises(ValueError, match="segment must be"):
            kv_pack.pack(cache, *LAYERS, 1, tables, torch.zeros(size, dtype=torch.uint8, device=device))
    data = torch.zeros(33 * right, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="multiple of 4"):
        kv_pack.pack(cache, *LAYERS, 1, tables, data[1 : right + 1])
    with pytest.raises(ValueError, match="layers"):
        kv_pack.pack(cache, 2, 4, 1, tables, data[:right])
    with pytest.raises(ValueError, match="33 blocks, tables of 32"):
        kv_pack.pack(cache, *LAYERS, 33, tables, data)
    with pytest.raises(ValueError, match="flat bytes"):
        kv_pack.pack(cache, *LAYERS, 1, tables, data[:right].view(torch.int32))
    with pytest.raises(ValueError, match="int64"):
        PackTables(tables.block_ids, tables.salts, tables.sums, tables.fingerprints.int())
