"""What the Triton packer does under Triton's interpreter, as one line of JSON; run by `test_packing.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from baton.engine.kernels import kv_pack
from kv_transfer.triton_packing import TritonPacker, upload, warm_up
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
    layout = layout_of("float16")
    cache, data = random_bits(layout), buffer_for(layout)
    packer = TritonPacker()
    fingerprints = packer.start_pack(cache, SEGMENT, BLOCK_IDS, data, SALTS).wait()
    ok = packer.start_unpack(cache, SEGMENT, [1, 2, 4], data, SALTS, fingerprints).wait()
    bad = packer.start_unpack(cache, SEGMENT, [1, 2, 4], data, SALTS, [0, *fingerprints[1:]]).wait()
    moved = same_bits(cache[1:3][:, :, [1, 2, 4]], cache[1:3][:, :, BLOCK_IDS])

    kv_pack.move_blocks_kernel = launches = Launches(kv_pack.move_blocks_kernel)
    before = cache.clone()
    warm_up(cache)
    directions = [constants["PACK"] for _, constants in launches.seen]
    for count in (2, 3):
        segment = SEGMENT._replace(block_end=SEGMENT.block_start + count)
        room = torch.zeros(layout.segment_bytes(segment.num_layers, count), dtype=torch.uint8)
        packer.start_pack(cache, segment, range(count), room, SALTS[:1].repeat(count)).wait()
    kernels = {json.dumps(launch) for launch in launches.seen}
    odd = [upload(np.zeros(count, dtype=np.int64), SALTS[:1].repeat(count), CPU) for count in (1, 3)]
    are_aligned = [(salts.data_ptr() - ids.data_ptr()) % 16 == 0 for ids, salts in odd]
    answers = [fingerprints, ok, bad, moved, same_bits(cache, before), directions, len(kernels), are_aligned]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
