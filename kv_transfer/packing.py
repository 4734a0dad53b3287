"""Packing: KV blocks to and from the contiguous form in which a segment travels, with a fingerprint per block.

A segment in staging is [num_layers_in_segment, 2, num_blocks_in_segment, block_size, num_kv_heads, head_dim]. Packers
are called on a transfer thread; on CUDA they launch on its current stream.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from kv_transfer.fingerprint import WORD_BYTES, Salts, splitmix64_tensor, word_multipliers
from kv_transfer.messages import Segment

logger = logging.getLogger(__name__)
T_co = TypeVar("T_co", covariant=True)

_WORD_MASK = 0xFFFFFFFF


class Copy(Protocol[T_co]):
    """A pack or unpack under way."""

    def wait(self) -> T_co:
        """Blocks until it is done; its result. Once, from any thread."""
        ...


class Packer(Protocol):
    """`kv_cache` is the whole cache, `block_ids` the physical blocks of the segment in logical order."""

    def start_pack(
        self, kv_cache: torch.Tensor, segment: Segment, block_ids: Sequence[int], out: torch.Tensor, salts: Salts
    ) -> Copy[list[int]]:
        """Gather the segment into `out`, uint8 [segment bytes]; the result is one fingerprint per block."""
        ...

    def start_unpack(
        self,
        kv_cache: torch.Tensor,
        segment: Segment,
        block_ids: Sequence[int],
        data: torch.Tensor,
        salts: Salts,
        expected: Sequence[int],
    ) -> Copy[bool]:
        """Scatter `data` into the blocks; the result is whether its fingerprints are the expected ones.

        After False the blocks' content is undefined on CUDA (one pass hashes and scatters) and untouched on the CPU.
        """
        ...


class Done(Generic[T_co]):
    """A copy that has ended already."""

    def __init__(self, result: T_co) -> None:
        self._result = result

    def wait(self) -> T_co:
        return self._result


class TorchPacker:
    """The reference, for CPU tensors: verifies before it scatters, and has ended when it returns."""

    def __init__(self) -> None:
        self._multipliers: dict[int, torch.Tensor] = {}

    def start_pack(
        self, kv_cache: torch.Tensor, segment: Segment, block_ids: Sequence[int], out: torch.Tensor, salts: Salts
    ) -> Copy[list[int]]:
        return Done(self.pack(kv_cache, segment, block_ids, out, salts))

    def start_unpack(
        self,
        kv_cache: torch.Tensor,
        segment: Segment,
        block_ids: Sequence[int],
        data: torch.Tensor,
        salts: Salts,
        expected: Sequence[int],
    ) -> Copy[bool]:
        return Done(self.unpack(kv_cache, segment, block_ids, data, salts, expected))

    def pack(
        self, kv_cache: torch.Tensor, segment: Segment, block_ids: Sequence[int], out: torch.Tensor, salts: Salts
    ) -> list[int]:
        ids = checked_ids(kv_cache, segment, block_ids, out, salts)
        layers = kv_cache[segment.layer_start : segment.layer_end]
        torch.index_select(layers, 2, torch.from_numpy(ids), out=_as_blocks(kv_cache, segment, out))
        return self.fingerprints(segment, out, salts)

    def unpack(
        self,
        kv_cache: torch.Tensor,
        segment: Segment,
        block_ids: Sequence[int],
        data: torch.Tensor,
        salts: Salts,
        expected: Sequence[int],
    ) -> bool:
        ids = checked_ids(kv_cache, segment, block_ids, data, salts)
        if not are_expected(self.fingerprints(segment, data, salts), expected):
            return False
        layers = kv_cache[segment.layer_start : segment.layer_end]
        layers.index_copy_(2, torch.from_numpy(ids), _as_blocks(kv_cache, segment, data))
        return True

    def fingerprints(self, segment: Segment, data: torch.Tensor, salts: Salts) -> list[int]:
        """One fingerprint per block of a packed segment, `data` uint8 [segment bytes]."""
        planes = data.view(torch.int32).view(2 * segment.num_layers, segment.num_blocks, -1)
        words_per_plane = planes.shape[2]
        multipliers = self._multipliers_for(planes.shape[0] * words_per_plane)
        total = torch.zeros(segment.num_blocks, dtype=torch.int64)
        for index, plane in enumerate(planes):
            weights = multipliers[index * words_per_plane : (index + 1) * words_per_plane]
            total += ((plane.to(torch.int64) & _WORD_MASK) * weights).sum(dim=1)
        found = splitmix64_tensor(total ^ torch.from_numpy(salts.view(np.int64)))
        return cast(list[int], found.numpy().view(np.uint64).tolist())

    def _multipliers_for(self, num_words: int) -> torch.Tensor:
        cached = self._multipliers.get(num_words)
        if cached is None:
            cached = self._multipliers[num_words] = word_multipliers(num_words, torch.device("cpu"))
        return cached


def are_expected(found: Sequence[int], expected: Sequence[int]) -> bool:
    """Compare fingerprints. What differs is logged: one block hints at its bytes, all of them at another chunk."""
    if list(found) == list(expected):
        return True
    wrong = [index for index, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other]
    logger.warning(
        "%d of %d blocks of a chunk do not match their %d fingerprints, the first is block %s of it",
        len(wrong),
        len(found),
        len(expected),
        wrong[0] if wrong else None,
    )
    return False


def checked_ids(
    kv_cache: torch.Tensor, segment: Segment, block_ids: Sequence[int], data: torch.Tensor, salts: Salts
) -> npt.NDArray[np.int64]:
    """The block ids as an array. Raises ValueError unless all arguments describe the same segment of this cache."""
    num_layers, _, num_blocks, block_size, num_kv_heads, head_dim = kv_cache.shape
    if not 0 <= segment.layer_start < segment.layer_end <= num_layers:
        raise ValueError(f"{segment} is outside a cache of {num_layers} layers")
    if not len(block_ids) == len(salts) == segment.num_blocks > 0:
        raise ValueError(f"{segment} with {len(block_ids)} block ids and {len(salts)} salts")
    ids = np.array(block_ids, dtype=np.int64)
    if ids.view(np.uint64).max() >= num_blocks:  # negative ones are large without their sign
        raise ValueError(f"block ids {min(block_ids)} to {max(block_ids)} in a cache of {num_blocks} blocks")
    plane_bytes = block_size * num_kv_heads * head_dim * kv_cache.element_size()
    expected = 2 * segment.num_layers * segment.num_blocks * plane_bytes
    if data.dtype != torch.uint8 or data.numel() != expected or plane_bytes % WORD_BYTES:
        raise ValueError(f"{segment} takes {expected} bytes, the buffer is {data.dtype} [{data.numel()}]")
    return ids


def _as_blocks(kv_cache: torch.Tensor, segment: Segment, data: torch.Tensor) -> torch.Tensor:
    """`data` as [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim] of the segment."""
    return data.view(kv_cache.dtype).view(segment.num_layers, 2, segment.num_blocks, *kv_cache.shape[3:])


def make_packer(device: torch.device) -> Packer:
    """The packer for KV on `device`."""
    if device.type == "cpu":
        return TorchPacker()
    return cast(Packer, _triton_packing().TritonPacker(device))


def warm_up(kv_cache: torch.Tensor) -> None:
    """Compile and load what packing of this cache launches. Blocks; before transfers and the engine begin.

    Else the first chunk does it, on the thread that has to post the receives of all chunks.
    """
    if kv_cache.device.type != "cpu":
        _triton_packing().warm_up(kv_cache)


def _triton_packing() -> Any:
    """Imported by name: a machine without a GPU may have no Triton, and nothing else of this package needs it."""
    return importlib.import_module("kv_transfer.triton_packing")
