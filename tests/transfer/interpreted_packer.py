"""What the Triton packer does under Triton's interpreter, as one line of JSON; run by `test_packing.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from baton.engine.kernels import kv_pack
from kv_transfer.triton_packing import TritonPacker, warm_up
from tests.transfer.test_packing import BLOCK_IDS, CPU, SALTS, SEGMENT, buffer_for, layout_of, random_bits, same_bits


class Launches:
    """Notes what a compiled kernel depends on, of each launch of `kernel`: where its tensors lie, and its constants."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.seen: list[tuple[list[bool], dict[str, object]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            aligned = [arg.data_ptr() % 16 == 0 for arg in args if isinstance(arg, torch.Tensor)]
            self.seen.append((aligned, constants))
            self._kernel[grid](*args, **constants)

        return launch


def main() -> None:
    kv_pack.move_blocks_kernel = launches = Launches(kv_pack.move_blocks_kernel)
    layout = layout_of("float16")
    cache, data = random_bits(layout), buffer_for(layout)
    before = cache.clone()
    warm_up(cache)
    is_as_before = same_bits(cache, before)
    directions = [constants["PACK"] for _, constants in launches.seen]

    packer = TritonPacker(CPU)
    fingerprints = packer.start_pack(cache, SEGMENT, BLOCK_IDS, data, SALTS).wait()
    ok = packer.start_unpack(cache, SEGMENT, [1, 2, 4], data, SALTS, fingerprints).wait()
    bad = packer.start_unpack(cache, SEGMENT, [1, 2, 4], data, SALTS, [0, *fingerprints[1:]]).wait()
    moved = same_bits(cache[1:3][:, :, [1, 2, 4]], before[1:3][:, :, BLOCK_IDS])
    kernels = {json.dumps(launch) for launch in launches.seen}

    # More at once than was prepared, then a chunk of more blocks than any before.
    at_once = [packer.start_pack(cache, SEGMENT, BLOCK_IDS, data, SALTS) for _ in range(20)]
    are_equal = len({tuple(copy.wait()) for copy in at_once}) == 1
    many = SEGMENT._replace(block_end=SEGMENT.block_start + 1500)
    room = torch.zeros(layout.segment_bytes(many.num_layers, 1500), dtype=torch.uint8)
    long = packer.start_pack(cache, many, [3] * 1500, room, np.arange(1500, dtype=np.uint64)).wait()
    are_all_there = len(set(long)) == 1500
    print(json.dumps([fingerprints, ok, bad, moved, is_as_before, directions, len(kernels), are_equal, are_all_there]))


if __name__ == "__main__":
    main()
