"""What launching costs the host: each kernel through its wrapper, and a whole forward pass, kernel by kernel.

`python -m benchmarks.launch_cost --out launch_cost.json`, without a GPU: kernels are compiled for one and launched into
nothing, and the tensors have shapes but no memory. So the figures hold what Python, Triton and torch do up to the
driver's own launch, which takes a few microseconds more. Of products by a matrix library only the allocation is left.
The smallest of many, in microseconds; in the shape of Llama-3.1-8B, bfloat16.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from baton.engine.attention.base import AttentionMetadata
from baton.engine.attention.triton_backend import TritonBackend
from baton.engine.cuda import layers as cuda_layers
from baton.engine.kernels.rms_norm import rms_norm
from baton.engine.kernels.silu_mul import silu_mul
from baton.engine.layers.linear import FusedLinear
from baton.engine.models import decoder
from baton.engine.models.config import load_model_config
from benchmarks.engine.shapes import write_shape
from benchmarks.gpu_timing import git_commit

META = torch.device("meta")
DTYPE = torch.bfloat16
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, BLOCK = 4096, 32, 8, 128, 14336, 16
SCALE = HEAD_DIM**-0.5
PREFILL_TOKENS = (512,)
DECODES = (8, 64)


class NoDriver:
    """In place of Triton's driver: an H100 on which every kernel is ready at once and does nothing."""

    num_launches = 0

    class utils:  # noqa: N801 (Triton's name)
        @staticmethod
        def load_binary(*_: object) -> tuple[int, int, int, int, int]:
            return 1, 1, 0, 0, 1024

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 232_448}

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *_: object) -> None:
        self.num_launches += 1

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    arguments = parser.parse_args()
    stub = NoDriver()
    driver.set_active(stub)
    with on_a_gpu():
        rows = list(measure(stub, arguments.seconds))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({**environment(arguments.commit), "rows": rows}, indent=1) + "\n")


def measure(stub: NoDriver, seconds: float) -> Iterator[dict[str, object]]:
    for name, call in (*wrappers(), *forwards()):
        call()
        before = stub.num_launches
        call()
        launches = stub.num_launches - before
        row = {"call": name, "us": round(smallest(call, seconds) * 1e6, 1), "launches": launches}
        print(row, flush=True)
        yield row


def environment(commit: str | None) -> dict[str, object]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or git_commit(),
    }


def smallest(call: Callable[[], object], seconds: float) -> float:
    """Of calls in series of ten, or one where that takes long: the machine may do other things at times."""
    started = time.perf_counter()
    call()
    count = 10 if time.perf_counter() - started < 0.001 else 1
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        before = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - before) / count)
    return best


def wrappers() -> Iterator[tuple[str, Callable[[], object]]]:
    backend = TritonBackend(META)
    for num_tokens, num_decodes in ((512, 0), (8, 8)):
        name = f"{num_tokens} tokens"
        x, residual = empty(num_tokens, HIDDEN), empty(num_tokens, HIDDEN)
        yield f"rms_norm with residual, {name}", partial(rms_norm, x, empty(HIDDEN), 1e-5, residual)
        fused = empty(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = fused[:, :HEADS], fused[:, HEADS:-KV_HEADS], fused[:, -KV_HEADS:]
        meta, positions = metadata(num_tokens, num_decodes)
        table, layer_kv = empty(4096, HEAD_DIM, dtype=torch.float32), empty(2, 2048, BLOCK, KV_HEADS, HEAD_DIM)
        yield f"rope_and_store, {name}", partial(backend.rope_and_store, q, k, v, positions, table, layer_kv, meta)
        yield f"attend, {name}", partial(backend.attend, q, layer_kv, meta, SCALE, (k, v))
        yield f"silu_mul, {name}", partial(silu_mul, empty(num_tokens, 2 * MLP))
    x = empty(8, HIDDEN)
    for name, size in (("out", HIDDEN), ("gate_up", 2 * MLP)):
        weight = empty(size, HIDDEN)
        call = cuda_layers.gated_linear if name == "gate_up" else cuda_layers.linear_parts
        yield f"few_linear {name}, 8 tokens", partial(call, x, weight, None)


def forwards() -> Iterator[tuple[str, Callable[[], object]]]:
    """Of the whole model."""
    with tempfile.TemporaryDirectory() as directory:
        config = load_model_config(write_shape("llama-3.1-8b", Path(directory)))
    model = decoder.Decoder(config, 4096, DTYPE, META)
    kv_cache = empty(config.num_layers, 2, 2048, BLOCK, KV_HEADS, HEAD_DIM)
    backend = TritonBackend(META)

    def forward(num_tokens: int, num_decodes: int) -> None:
        meta, positions = metadata(num_tokens, num_decodes)
        input_ids = empty(num_tokens, dtype=torch.int64)
        with torch.inference_mode():
            model.forward(input_ids, positions, kv_cache, meta, backend)

    for num_tokens in PREFILL_TOKENS:
        yield f"forward, prefill of {num_tokens}", partial(forward, num_tokens, 0)
    for batch in DECODES:
        yield f"forward, decode of {batch} without a graph", partial(forward, batch, batch)


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """Calls that ask where a tensor lies find it on a GPU."""
    gpu = cuda_layers
    with (
        mock.patch.multiple(decoder, rms_norm=gpu.rms_norm, add_rms_norm=gpu.add_rms_norm),
        mock.patch.object(decoder, "gated_linear", lambda x, layer: gpu.gated_linear(x, layer.weight, layer.bias)),
        mock.patch.object(FusedLinear, "__call__", lambda layer, x: gpu.linear(x, layer.weight, layer.bias)),
        mock.patch.object(FusedLinear, "parts_of", lambda layer, x: gpu.linear_parts(x, layer.weight, layer.bias)),
        mock.patch("torch.nn.functional.linear", lambda x, weight, _: empty(len(x), len(weight))),
    ):
        yield


def metadata(num_tokens: int, num_decodes: int) -> tuple[AttentionMetadata, torch.Tensor]:
    """Of one prompt, or of decodes alone; and positions."""
    num_seqs = num_decodes or 1
    new = num_tokens - num_decodes
    meta = AttentionMetadata(
        cu_seqlens_q=empty(num_seqs + 1, dtype=torch.int32),
        context_lens=empty(num_seqs, dtype=torch.int32),
        block_tables=empty(num_seqs, 128, dtype=torch.int32),
        slot_mapping=empty(num_tokens, dtype=torch.int64),
        max_seqlen_q=max(new, 1),
        num_prefill_tokens=new,
        num_prefills=num_seqs - num_decodes,
        num_decodes=num_decodes,
        fresh_rows=((0, new),) if new else (),
    )
    return meta, empty(num_tokens, dtype=torch.int64)


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


if __name__ == "__main__":
    main()
