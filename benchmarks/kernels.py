"""Each kernel's rate beside its ceiling and beside torch's SDPA on the same tensors, in the shape of Llama-3.1-8B.

`python -m benchmarks.kernels --out result.json` on a GPU. Calls are timed in CUDA graphs, over several buffers in turn
where one would fit into the L2 cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from baton.engine.attention.base import AttentionMetadata
from baton.engine.attention.triton_backend import TritonBackend
from baton.engine.kernels import kv_pack, sampling
from baton.engine.kernels.rms_norm import rms_norm
from baton.engine.kernels.silu_mul import silu_mul
from benchmarks.gpu_timing import environment, measure_ceilings, require_gpu, seconds_per_call

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 4096, 32, 8, 128, 14336, 128256
SCALE = HEAD_DIM**-0.5
DTYPE = torch.bfloat16
KV_BYTES_PER_TOKEN = 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
_MIN_SECONDS = 0.15
COLD_BYTES = 2**28  # several times the L2 cache

PREFILLS = [(512, 0), (2048, 0), (8192, 0), (16384, 0), (2048, 6144), (512, 7680)]
DECODES = [(1, 2048), (1, 8192), (8, 2048), (64, 2048), (128, 2048), (128, 4096), (256, 2048)]
TOKENS = [1, 64, 256, 8192]


@dataclass(frozen=True)
class Row:
    """`unit` is GB/s or TFLOP/s; `ceiling` and `share` refer to the ceiling in the same unit."""

    kernel: str
    shape: str
    microseconds: float
    rate: float
    unit: str
    ceiling: float
    share: float
    sdpa_microseconds: dict[str, float | None]


class Bench:
    """Runs the measurements on one device; yields rows as they come."""

    def __init__(self, device: torch.device, ceilings: dict[str, float]) -> None:
        self._device = device
        self._ceilings = ceilings
        self._backend = TritonBackend(device)

    def rows(self) -> Iterator[Row]:
        for new, prefix in PREFILLS:
            yield self._prefill(new, prefix, 16)
        yield self._prefill(8192, 0, 64)
        for batch, context in DECODES:
            yield self._decode(batch, context, 16)
        yield self._decode(128, 4096, 64)
        for tokens in TOKENS:
            yield from self._per_token(tokens)
        yield from self._packing(2048, 8)
        yield from self._sampling(256)

    def _prefill(self, new: int, prefix: int, block_size: int) -> Row:
        context = new + prefix
        caches, meta = self._cache(1, context, block_size)
        starts = torch.tensor([0, new], dtype=torch.int32, device=self._device)
        meta = AttentionMetadata(starts, meta.context_lens, meta.block_tables, meta.slot_mapping, new, new, 1, 0)
        q = self._random(new, HEADS, HEAD_DIM)
        calls = [partial(self._backend.attend, q, kv, meta, SCALE) for kv in caches]
        flops = 4 * HEADS * HEAD_DIM * (new * prefix + new * (new + 1) // 2)
        sdpa = self._sdpa(1, new, context, is_causal=True) if prefix == 0 else {}
        shape = f"{new} new, {prefix} cached, block {block_size}"
        return self._row("prefill_attention", shape, calls, flops=flops, sdpa=sdpa)

    def _decode(self, batch: int, context: int, block_size: int) -> Row:
        caches, meta = self._cache(batch, context, block_size)
        q = self._random(batch, HEADS, HEAD_DIM)
        calls = [partial(self._backend.attend, q, kv, meta, SCALE) for kv in caches]
        moved = batch * context * KV_BYTES_PER_TOKEN
        sdpa = self._sdpa(batch, 1, context, is_causal=False)
        shape = f"batch {batch}, context {context}, block {block_size}"
        return self._row("decode_attention", shape, calls, moved=moved, sdpa=sdpa)

    def _per_token(self, tokens: int) -> Iterator[Row]:
        copies = max(1, min(64, COLD_BYTES // (tokens * HIDDEN * DTYPE.itemsize)))
        caches, meta = self._cache(tokens, 16, 16)
        table = torch.rand(32, HEAD_DIM, device=self._device)
        positions = torch.full((tokens,), 15, dtype=torch.int64, device=self._device)
        fused = [self._random(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM) for _ in range(copies)]

        def rope(x: torch.Tensor, kv: torch.Tensor) -> None:
            q, k, v = x[:, :HEADS], x[:, HEADS:-KV_HEADS], x[:, -KV_HEADS:]
            self._backend.rope_and_store(q, k, v, positions, table, kv, meta)

        head = HEAD_DIM * DTYPE.itemsize
        moved = tokens * head * (2 * HEADS + 2 * KV_HEADS + 3 * KV_HEADS)
        yield self._row("rope_store", f"{tokens} tokens", [partial(rope, x, caches[0]) for x in fused], moved=moved)

        weight = self._random(HIDDEN)
        pairs = [(self._random(tokens, HIDDEN), self._random(tokens, HIDDEN)) for _ in range(copies)]
        norms = [partial(rms_norm, x, weight, 1e-5, residual) for x, residual in pairs]
        yield self._row("rms_norm", f"{tokens} tokens", norms, moved=4 * tokens * HIDDEN * DTYPE.itemsize)

        products = [self._random(tokens, 2 * MLP) for _ in range(max(1, copies // 8))]
        silus = [partial(silu_mul, x) for x in products]
        yield self._row("silu_mul", f"{tokens} tokens", silus, moved=3 * tokens * MLP * DTYPE.itemsize)

    def _packing(self, tokens: int, layers: int) -> Iterator[Row]:
        blocks = tokens // 16
        cache = self._random(layers, 2, 4 * blocks, 16, KV_HEADS, HEAD_DIM)
        ids = torch.randperm(4 * blocks, device=self._device)[:blocks]
        others = (torch.zeros(blocks, dtype=torch.int64, device=self._device) for _ in range(3))
        tables = kv_pack.PackTables(ids, *others)
        size = layers * tokens * KV_BYTES_PER_TOKEN
        data = torch.empty(size, dtype=torch.uint8, device=self._device)
        shape = f"{tokens} tokens, {layers} layers, block 16"
        pack = [partial(kv_pack.pack, cache, 0, layers, blocks, tables, data)]
        yield self._row("kv_pack", shape, pack, moved=2 * size)
        unpack = [partial(kv_pack.unpack, cache, 0, layers, blocks, tables, data)]
        yield self._row("kv_unpack", shape, unpack, moved=2 * size)

    def _sampling(self, batch: int) -> Iterator[Row]:
        logits = torch.randn(batch, VOCAB, device=self._device) * 3
        index = torch.arange(batch, device=self._device)
        for name, temperature, top_k, top_p in (
            ("greedy", 0.0, -1, 1.0),
            ("temperature", 1.0, -1, 1.0),
            ("top-k 50", 1.0, 50, 1.0),
            ("top-p 0.9", 1.0, -1, 0.9),
        ):
            t, p = (torch.full((batch,), x, device=self._device) for x in (temperature, top_p))
            k = torch.full((batch,), top_k, device=self._device)
            no_min_p = torch.full((batch,), float("inf"), device=self._device)
            draw = [partial(sampling.sample, logits, t, k, p, no_min_p, index, index, index)]
            yield self._row("sampling", f"batch {batch}, {name}", draw, moved=batch * VOCAB * 4)

    def _row(
        self,
        kernel: str,
        shape: str,
        calls: Sequence[Callable[[], object]],
        *,
        moved: int = 0,
        flops: int = 0,
        sdpa: dict[str, float | None] | None = None,
    ) -> Row:
        seconds = seconds_per_call(calls, _MIN_SECONDS)
        # Attention over a cache only reads; the others read and write.
        ceiling = self._ceilings[
            "matmul_tflop_s" if flops else "read_gb_s" if kernel in ("decode_attention", "sampling") else "copy_gb_s"
        ]
        rate = flops / seconds / 1e12 if flops else moved / seconds / 1e9
        unit = "TFLOP/s" if flops else "GB/s"
        return Row(kernel, shape, seconds * 1e6, rate, unit, ceiling, rate / ceiling, sdpa or {})

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=DTYPE, device=self._device)

    def _cache(self, batch: int, context: int, block_size: int) -> tuple[list[torch.Tensor], AttentionMetadata]:
        """Layers enough to leave the L2 cache cold, and the metadata of a decode batch with shuffled blocks."""
        per_seq = -(-context // block_size)
        num_layers = max(1, min(32, COLD_BYTES // (batch * context * KV_BYTES_PER_TOKEN)))
        shape = (2, batch * per_seq, block_size, KV_HEADS, HEAD_DIM)
        caches = [self._random(*shape) for _ in range(num_layers)]
        tables = torch.randperm(batch * per_seq, device=self._device).int().view(batch, per_seq)
        slots = tables[:, -1].long() * block_size + (context - 1) % block_size
        starts = torch.arange(batch + 1, dtype=torch.int32, device=self._device)
        lens = torch.full((batch,), context, dtype=torch.int32, device=self._device)
        return caches, AttentionMetadata(starts, lens, tables, slots, 1, 0, 0, batch)

    def _sdpa(self, batch: int, new: int, context: int, *, is_causal: bool) -> dict[str, float | None]:
        """Microseconds of each backend of SDPA on contiguous tensors; None where it refuses them."""
        copies = max(1, min(32, COLD_BYTES // (batch * context * KV_BYTES_PER_TOKEN)))
        q = self._random(batch, HEADS, new, HEAD_DIM)
        pairs = [
            (self._random(batch, KV_HEADS, context, HEAD_DIM), self._random(batch, KV_HEADS, context, HEAD_DIM))
            for _ in range(copies)
        ]
        found: dict[str, float | None] = {}
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            calls = [partial(_sdpa_call, q, k, v, is_causal, backend) for k, v in pairs]
            try:
                found[name] = seconds_per_call(calls, _MIN_SECONDS) * 1e6
            except RuntimeError as error:
                print(f"SDPA {name} refuses batch {batch}, {new} over {context}: {str(error).splitlines()[0]}")
                found[name] = None
        return found


def _sdpa_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, backend: SDPBackend) -> torch.Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=SCALE, enable_gqa=True)


def print_table(rows: list[Row], ceilings: dict[str, float]) -> None:
    table = Table(title=", ".join(f"{name} {value:.0f}" for name, value in ceilings.items()))
    for column in ("kernel", "shape", "µs", "rate", "unit", "of ceiling", "SDPA cuDNN µs", "SDPA flash µs"):
        table.add_column(column, justify="left" if column in ("kernel", "shape", "unit") else "right")
    for row in rows:
        sdpa = [row.sdpa_microseconds.get(name) for name in ("cudnn", "flash")]
        times = ["" if value is None else f"{value:.1f}" for value in sdpa]
        rate, share = f"{row.rate:.0f}", f"{row.share:.1%}"
        table.add_row(row.kernel, row.shape, f"{row.microseconds:.1f}", rate, row.unit, share, *times)
    Console(width=140).print(table)


def measure_kernels(out: Path, commit: str | None) -> None:
    """Measure all, print a table, write JSON. Ends the program where there is no GPU."""
    device = require_gpu("baton bench kernels")
    ceilings = measure_ceilings(device)
    rows: list[Row] = []
    for row in Bench(device, ceilings).rows():
        rows.append(row)
        print(f"{row.kernel} {row.shape}: {row.microseconds:.1f} µs, {row.share:.1%}", flush=True)
        torch.cuda.empty_cache()
    print_table(rows, ceilings)
    result = {**environment(device, commit), "ceilings": ceilings, "rows": [asdict(row) for row in rows]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--commit", help="commit to record where git is not at hand")
    arguments = parser.parse_args()
    measure_kernels(arguments.out, arguments.commit)


if __name__ == "__main__":
    main()
