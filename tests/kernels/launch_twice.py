"""Every wrapper twice with its kernel compiled and the GPU's driver left out: `python -m tests.kernels.launch_twice`.

The first launch is Triton's own, the second ours: both must hand the driver the same. One JSON line per kernel. A
process of its own, because TRITON_INTERPRET, which the other kernel tests set, turns the compiler off at import.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from triton.runtime import driver

from baton.engine.kernels import kv_pack
from baton.engine.kernels.decode_attention import decode_attention
from baton.engine.kernels.few_linear import few_gated_linear, few_linear
from baton.engine.kernels.prefill_attention import prefill_attention
from baton.engine.kernels.rms_norm import rms_norm
from baton.engine.kernels.rope_store import rope_and_store
from baton.engine.kernels.silu_mul import silu_mul
from baton.engine.kernels.thin_linear import thin_gated_linear, thin_linear
from baton.engine.kernels.tuning import DecodeConfig, FewConfig, PrefillConfig, ThinConfig
from benchmarks.launch_cost import NoDriver


class RecordingDriver(NoDriver):
    """Keeps what was launched: name and arguments of the kernel, tensors as shape, dtype and strides.

    Left out are the fourth to sixth behind the grid: what hooks are told, and the hooks, of which we have none.
    """

    def __init__(self) -> None:
        self.launched: list[tuple[str, str]] = []

    def launcher_cls(self, *of: Any) -> Callable[..., None]:
        name: str = of[0].fn.__name__

        def launch(*arguments: object) -> None:
            self.launched.append((name, str([_plain(argument) for argument in (*arguments[:6], *arguments[9:])])))

        return launch


def _plain(argument: object) -> object:
    if isinstance(argument, torch.Tensor):
        return tuple(argument.shape), argument.dtype, argument.stride()
    return argument if isinstance(argument, int | float | str | tuple | None) else type(argument).__name__


def calls() -> Iterator[Callable[[], object]]:
    new = partial(torch.zeros, dtype=torch.bfloat16)
    ints = partial(torch.zeros, dtype=torch.int32)
    x, weight, bias = new(3, 64), new(48, 64), new(48)
    yield partial(rms_norm, x, new(64), 1e-5)
    yield partial(rms_norm, torch.zeros(2, 3, 64), new(64), 1e-5, new(3, 64))
    yield partial(silu_mul, new(3, 96))
    heads, kv = new(3, 8, 32), new(2, 4, 16, 2, 32)
    q, k, v = heads[:, :4], heads[:, 4:6], heads[:, 6:]
    index = torch.zeros(3, dtype=torch.int64)
    yield partial(rope_and_store, q, k, v, index, torch.zeros(9, 32), kv, index)
    attention = (q, kv, new(3, 4, 32))
    prefill = PrefillConfig(32, 16, 4, 2)
    for max_new_tokens in (0, 5):
        yield partial(prefill_attention, *attention, ints(2), ints(1), ints(1, 4), 0, 3, 0.1, prefill, max_new_tokens)
    yield partial(decode_attention, *attention, ints(3), ints(3, 4), 3, 0.1, DecodeConfig(16, 4, 2, 4, 1))
    for splits in (1, 2):
        yield partial(few_linear, x, weight, bias, FewConfig(32, 32, 4, 2, splits))
    yield partial(few_gated_linear, x, weight, FewConfig(32, 32, 4, 2, 1))
    yield partial(thin_linear, x[:1], weight, None, ThinConfig(16, 32, 4, 2))
    yield partial(thin_gated_linear, x[:1], weight, ThinConfig(16, 32, 4, 2))


def pack(num_blocks: int) -> None:
    """Of one layer, whichever it is: the size is not what the launch was settled for."""
    kv, tables = torch.zeros(3, 2, 600, 16, 2, 8), torch.zeros(4, 600, dtype=torch.int64)
    layer = num_blocks % 3
    data = torch.zeros(num_blocks * kv[0, :, 0].nbytes, dtype=torch.uint8)
    kv_pack.pack(kv, layer, layer + 1, num_blocks, kv_pack.PackTables(*tables), data)


def of_other_sizes(recording: RecordingDriver) -> Iterator[list[list[tuple[str, str]]]]:
    """Chunks by launches that a chunk of another size has settled, and by Triton."""
    for sizes in ((7, 512), (512, 1), (1, 16)):
        kv_pack._plan.cache_clear()
        rounds = []
        for num_blocks in sizes:
            recording.launched = []
            pack(num_blocks)
        rounds.append(recording.launched)
        kv_pack._plan.cache_clear()
        recording.launched = []
        pack(sizes[-1])
        yield [*rounds, recording.launched]


def again_and_again(recording: RecordingDriver) -> Iterator[list[list[tuple[str, str]]]]:
    for call in calls():
        rounds = []
        for _ in range(3):
            recording.launched = []
            call()
            rounds.append(recording.launched)
        yield rounds


def main() -> None:
    recording = RecordingDriver()
    driver.set_active(recording)
    for rounds in (*again_and_again(recording), *of_other_sizes(recording)):
        first, *others = rounds
        for name, arguments in first:
            is_same = others == [first] * len(others)
            print(json.dumps({"kernel": name, "arguments": arguments, "same": is_same}), flush=True)


if __name__ == "__main__":
    main()
