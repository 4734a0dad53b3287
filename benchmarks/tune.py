"""The measurements behind the tuning table: variants of kernels at the shapes of Llama-3.1-8B.

`python -m benchmarks.tune --out tune.json` on a GPU. A variant that does not run is recorded with its reason.
`--best tune.json` instead prints the flags of `baton bench engine` that try what was fastest for a few rows.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from baton.engine.kernels.decode_attention import decode_attention
from baton.engine.kernels.few_linear import few_gated_linear, few_linear
from baton.engine.kernels.prefill_attention import prefill_attention
from baton.engine.kernels.thin_linear import thin_linear
from baton.engine.kernels.tuning import DecodeConfig, FewConfig, PrefillConfig, ThinConfig, Tuning
from benchmarks.gpu_timing import environment, require_gpu, seconds_per_call

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
WEIGHTS = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LM_HEAD = {"lm_head": (128256, 4096)}
THIN_ROWS = (1,)
THIN = [(16, 256, 4, 4), (8, 512, 4, 4), (8, 256, 4, 5), (8, 1024, 4, 3), (4, 1024, 4, 3)]
# Rows of x; block_out, block_in, num_warps, num_stages by splits.
FEW_ROWS = (8, 32, 64)
FEW = [(64, 128, 4, 4), (64, 128, 4, 5), (64, 256, 4, 3), (64, 64, 4, 5), (128, 64, 8, 5), (128, 128, 8, 4)]
FEW_SPLITS = {"qkv": (1,), "out": (1, 2, 4), "gate_up": (1,), "down": (2, 4, 7), "lm_head": (1,)}
# What the tuning table calls a weight's product.
KIND_OF = {"qkv": "plain", "out": "short", "gate_up": "gated", "down": "long", "lm_head": "wide"}
DECODES = [(1, 2048), (1, 8192), (8, 2048), (64, 2048), (128, 4096)]
# block_n, num_warps, num_stages, programs per SM, min_tiles
DECODE = [(64, 4, 4, 2, 1), (64, 4, 5, 2, 1), (128, 4, 3, 2, 1), (64, 4, 4, 1, 1), (64, 4, 4, 3, 1), (64, 8, 4, 2, 1)]
PREFILL = [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2), (256, 64, 8, 2)]


Call = Callable[[], object]
Kind = Callable[[torch.device], Iterator[tuple[str, list[Call]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--best", type=Path, metavar="RESULT")
    parser.add_argument("--commit")
    parser.add_argument("--only", choices=sorted((*KINDS, "few")), action="append", help="all by default")
    parser.add_argument("--min-seconds", type=float, default=0.05)
    parser.add_argument("--rows", type=int, action="append", help="of x in products of a few rows")
    arguments = parser.parse_args()
    if arguments.best is not None:
        print(" ".join(best_flags(json.loads(arguments.best.read_text())["rows"])))
        return
    if arguments.out is None:
        parser.error("--out or --best is needed")
    device = require_gpu("benchmarks.tune")
    result: dict[str, Any] = {**environment(device, arguments.commit), "rows": (rows := [])}
    few_rows = tuple(arguments.rows or FEW_ROWS)
    kinds: dict[str, Kind] = {**KINDS, "few": partial(few, num_rows=few_rows)}
    for name, calls in chain.from_iterable(kinds[kind](device) for kind in arguments.only or kinds):
        rows.append({"name": name, **measure(calls, arguments.min_seconds)})
        print(rows[-1], flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(calls: list[Call], min_seconds: float) -> dict[str, Any]:
    try:
        return {"us": round(seconds_per_call(calls, min_seconds) * 1e6, 2)}
    except Exception as error:  # noqa: BLE001 (a variant that a compiler refuses in any way is a result)
        return {"failed": f"{type(error).__name__}: {str(error)[:120]}"}


def thin(device: torch.device) -> Iterator[tuple[str, list[Call]]]:
    for (name, (out_size, in_size)), num_rows in product({**WEIGHTS, **LM_HEAD}.items(), THIN_ROWS):
        copies = max(2, 2**29 // (2 * out_size * in_size))
        weights = [torch.randn(out_size, in_size, dtype=torch.bfloat16, device=device) for _ in range(copies)]
        x = torch.randn(num_rows, in_size, dtype=torch.bfloat16, device=device)
        yield f"{name} rows {num_rows} cuBLAS", [partial(linear, x, w) for w in weights]
        for config in THIN:
            yield (
                f"{name} rows {num_rows} {config}",
                [partial(thin_linear, x, w, None, ThinConfig(*config)) for w in weights],
            )


def few(device: torch.device, num_rows: tuple[int, ...]) -> Iterator[tuple[str, list[Call]]]:
    """Gate-up with its activation, which cuBLAS's figure leaves out."""
    for (name, (out_size, in_size)), rows in product({**WEIGHTS, **LM_HEAD}.items(), num_rows):
        copies = max(2, 2**29 // (2 * out_size * in_size))
        weights = [torch.randn(out_size, in_size, dtype=torch.bfloat16, device=device) for _ in range(copies)]
        x = torch.randn(rows, in_size, dtype=torch.bfloat16, device=device)
        yield f"{name} rows {rows} cuBLAS", [partial(linear, x, w) for w in weights]
        for tile, splits in product(FEW, FEW_SPLITS[name]):
            config = FewConfig(*tile, splits)
            calls: list[Call] = [
                partial(few_gated_linear, x, w, config)
                if name == "gate_up"
                else partial(few_linear, x, w, None, config)
                for w in weights
            ]
            yield f"{name} rows {rows} {(*tile, splits)}", calls


def best_flags(rows: list[dict[str, Any]]) -> list[str]:
    """For `baton bench engine`: the fastest variant for each weight and number of rows where it beats cuBLAS."""
    best: dict[tuple[str, int], tuple[float, str]] = {}
    for row in rows:
        found = re.fullmatch(r"(\w+) rows (\d+) (cuBLAS|\(.*\))", row["name"])
        if found is None or found[1] not in KIND_OF or "us" not in row or found[2] == "1":
            continue
        key, variant = (KIND_OF[found[1]], int(found[2])), re.sub(r"[(),]", "", found[3])
        best[key] = min(best.get(key, (float("inf"), "")), (row["us"], variant))
    flags = []
    for (kind, num_rows), (_, variant) in best.items():
        padded = max(16, 1 << (num_rows - 1).bit_length())
        flags += [] if variant == "cuBLAS" else [f"--few '{padded} {kind} {variant}'"]
    return flags


def decode(device: torch.device) -> Iterator[tuple[str, list[Call]]]:
    num_sms = Tuning.of(device).num_sms
    for batch, context in DECODES:
        per_seq = context // BLOCK
        copies = max(1, min(32, 2**28 // (batch * context * 4096)))
        shape = (2, batch * per_seq, BLOCK, KV_HEADS, HEAD_DIM)
        caches = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(copies)]
        tables = torch.randperm(batch * per_seq, device=device).int().view(batch, per_seq)
        lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        q = torch.randn(batch, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
        out = torch.empty_like(q)
        for block_n, warps, stages, per_sm, min_tiles in DECODE:
            config = DecodeConfig(block_n, warps, stages, num_sms * per_sm // KV_HEADS, min_tiles)
            calls: list[Call] = [
                partial(decode_attention, q, kv, out, lens, tables, batch, SCALE, config) for kv in caches
            ]
            yield f"decode {batch} x {context} {(block_n, warps, stages, per_sm, min_tiles)}", calls


def prefill(device: torch.device) -> Iterator[tuple[str, list[Call]]]:
    for new in (2048, 8192):
        kv = torch.randn(2, new // BLOCK, BLOCK, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
        tables = torch.randperm(new // BLOCK, device=device).int().view(1, -1)
        starts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, new], [new]))
        q = torch.randn(new, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
        out = torch.empty_like(q)
        for config in PREFILL:
            call = partial(prefill_attention, q, kv, out, starts, lens, tables, 0, new, SCALE, PrefillConfig(*config))
            yield f"prefill {new} {config}", [call]


KINDS: dict[str, Kind] = {"thin": thin, "decode": decode, "prefill": prefill}


if __name__ == "__main__":
    main()
