"""Compile every kernel for generations of GPUs, without a GPU: `python -m tests.kernels.compile_kernels 80 90`.

Prints one JSON line per variant: capability, kernel, variant, shared memory. A process of its own, because
TRITON_INTERPRET, which the other kernel tests set, turns the compiler off at import.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton.engine.kernels import sampling
from baton.engine.kernels.decode_attention import decode_attention_kernel
from baton.engine.kernels.decode_inputs import decode_inputs_kernel
from baton.engine.kernels.decode_splits import merge_splits_kernel
from baton.engine.kernels.few_linear import few_linear_kernel
from baton.engine.kernels.greedy import greedy_parts_kernel, greedy_winner_kernel
from baton.engine.kernels.kv_pack import finish_fingerprints_kernel, move_blocks_kernel
from baton.engine.kernels.prefill_attention import prefill_attention_kernel
from baton.engine.kernels.rms_norm import rms_norm_kernel
from baton.engine.kernels.rope_store import rope_store_kernel
from baton.engine.kernels.sampling import race_kernel, row_max_kernel, winner_kernel
from baton.engine.kernels.sampling_limits import limits_kernel
from baton.engine.kernels.silu_mul import silu_mul_kernel
from baton.engine.kernels.thin_linear import thin_linear_kernel
from baton.engine.kernels.tuning import Tuning

# Types of arguments by name; pointers to values of the model's dtype are "*".
POINTERS = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "kv_ptr", "out_ptr", "x_ptr", "residual_ptr", "weight_ptr"), "*"),
    **dict.fromkeys(("gate_up_ptr", "logits_ptr", "bias_ptr"), "*"),
    **dict.fromkeys(("fingerprints_ptr", "records_ptr", "draws_ptr", "input_ids_ptr"), "*i64"),
    "tables_ptr": "*i32",
    **dict.fromkeys(("cu_seqlens_q_ptr", "context_lens_ptr", "block_tables_ptr"), "*i32"),
    **dict.fromkeys(("limit_ptr", "last_token_ptr", "best_token_ptr", "segment_ptr"), "*i32"),
    **dict.fromkeys(("positions_ptr", "slot_mapping_ptr", "block_ids_ptr", "sums_ptr", "salts_ptr"), "*i64"),
    **dict.fromkeys(("top_k_ptr", "seed_ptr", "choice_ptr", "position_ptr", "token_ptr"), "*i64"),
    **dict.fromkeys(("partial_ptr", "lse_ptr", "cos_sin_ptr", "maxima_ptr", "temperature_ptr", "top_p_ptr"), "*fp32"),
    "max_distance_ptr": "*fp32",
    "best_value_ptr": "*fp64",
}
FLOATS = ("scale_log2", "eps")


@dataclass(frozen=True)
class Variant:
    kernel: Any
    constants: dict[str, Any]
    dtype: str
    num_warps: int = 4
    num_stages: int = 3

    def compile(self, capability: int) -> int:
        """Bytes of shared memory of the compiled kernel."""
        types = {name: self._type(name) for name in self.kernel.arg_names}
        # As at run time: addresses and strides are multiples of 16, without which loads are narrow and not pipelined.
        aligned = [i for i, name in enumerate(types) if name.endswith("_ptr") or name.startswith(("stride", "v_off"))]
        source = ASTSource(
            fn=self.kernel,
            signature=types,
            constexprs=self.constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned if list(types)[i] not in self.constants},
        )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 0
        return int(compiled.metadata.shared)

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name == "kv_ptr" and self.kernel is move_blocks_kernel:
            return "*i32"
        if name == "position_ptr" or name not in POINTERS:
            return POINTERS.get(name, "fp32" if name in FLOATS else "i32")
        return POINTERS[name] if POINTERS[name] != "*" else f"*{self.dtype}"


def attention(
    tuning: Tuning, head_dim: int, block_size: int, group: int, dtype: str, *, every_path: bool = False
) -> Iterator[Variant]:
    """`every_path`: also for padded steps."""
    real = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    precision = "ieee" if dtype == "fp32" else "tf32"
    pad = triton.next_power_of_2(head_dim)
    common = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PAD": pad,
        "BLOCK_SIZE": block_size,
        "GROUP": group,
        "PRECISION": precision,
    }
    prefill = tuning.prefill(head_dim, real)
    for num_seqs_pad in (0, 16) if every_path else (0,):
        constants = {**common, "NUM_SEQS_PAD": num_seqs_pad, "BLOCK_M": prefill.block_m, "BLOCK_N": prefill.block_n}
        yield Variant(prefill_attention_kernel, constants, dtype, prefill.num_warps, prefill.num_stages)
    decode = tuning.decode(head_dim, 8, real)
    constants = {**common, "GROUP_PAD": 16, "NUM_HEADS": 8 * group, "BLOCK_N": decode.block_n, "NUM_SEQS_PAD": 128}
    yield Variant(decode_attention_kernel, constants, dtype, decode.num_warps, decode.num_stages)


def small_kernels(dtype: str, *, every_path: bool = False) -> Iterator[Variant]:
    heads = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128}
    merge = {"NUM_HEADS": 32, "HEAD_DIM": 128, "HEAD_DIM_PAD": 128, "BLOCK_N": 64, "NUM_SEQS_PAD": 128, "TILE": 16}
    yield Variant(merge_splits_kernel, merge, dtype)
    yield Variant(rope_store_kernel, {**heads, "HALF_PAD": 64, "BLOCK_H": 16}, dtype)
    yield Variant(
        rms_norm_kernel,
        {"SIZE": 4096, "SIZE_PAD": 4096, "HAS_RESIDUAL": True, "SPLITS": 2},
        dtype,
        num_warps=8,
    )
    yield Variant(silu_mul_kernel, {"SIZE": 14336, "BLOCK": 1024}, dtype)
    for pack in (True, False) if every_path else (True,):
        yield Variant(move_blocks_kernel, {"PLANE": 8192, "WORDS": 1024, "BLOCKS": 8, "PACK": pack}, dtype)
    yield Variant(finish_fingerprints_kernel, {"BLOCK": 256}, dtype)
    vocab, parts = {"VOCAB_SIZE": 128256}, {"NUM_PARTS": 32, "PARTS_PAD": 32}
    tiles = {"TILE": sampling.TILE, "TILES": sampling.TILES_PER_PROGRAM}
    yield Variant(row_max_kernel, {**vocab, **tiles}, dtype)
    limits = {**vocab, **parts, "TILE": sampling.LIMIT_TILE}
    yield Variant(limits_kernel, limits, dtype, num_warps=sampling.LIMIT_WARPS)
    yield Variant(race_kernel, {**vocab, **parts, **tiles}, dtype)
    yield Variant(winner_kernel, parts, dtype, num_warps=1)
    yield Variant(decode_inputs_kernel, {"MAX_BLOCKS": 512, "BLOCK_SIZE": 16, "TILE": 256}, dtype, num_warps=2)
    yield Variant(greedy_parts_kernel, {**vocab, "TILE": 2048, "TILES": 2}, dtype)
    yield Variant(greedy_winner_kernel, parts, dtype, num_warps=1)
    sizes = {"IN_SIZE": 4096, "HAS_BIAS": True, "STAGES": 4}
    yield Variant(thin_linear_kernel, {**sizes, "BLOCK_OUT": 16, "BLOCK_IN": 256, "GATED": True}, dtype)
    few = {**sizes, "SPLIT_SIZE": 2048, "BLOCK_OUT": 64, "BLOCK_IN": 128}
    if every_path:
        yield Variant(few_linear_kernel, {**few, "ROWS": 16, "GATED": False}, dtype)
    yield Variant(few_linear_kernel, {**few, "ROWS": 64, "GATED": True, "STAGES": 3}, dtype)


def variants(capability: int) -> Iterator[Variant]:
    """A spread, not the full product: every kind of tile of the tuning tables, both kinds of block id loads.

    Every kernel for every generation; what else it can be told to do for the one that we have.
    """
    tuning, is_ours = Tuning(generation=capability // 10, num_sms=132), capability == 90
    yield from attention(tuning, 128, 16, 4, "bf16", every_path=is_ours)
    yield from attention(tuning, 256, 64, 1, "fp16")
    if is_ours:
        yield from attention(tuning, 96, 32, 3, "bf16")
        yield from attention(tuning, 64, 32, 8, "fp32")
    yield from small_kernels("fp16" if capability == 80 else "bf16", every_path=is_ours)


def compile_one(capability: int, index: int) -> str:
    """JSON of the variant at `index`, which is found again here because kernels cannot be sent to a process."""
    variant = list(variants(capability))[index]
    constants = " ".join(f"{name}={value}" for name, value in variant.constants.items())
    name, shared = variant.kernel.__name__, variant.compile(capability)
    return json.dumps(
        {"capability": capability, "kernel": name, "variant": f"{variant.dtype} {constants}", "shared": shared}
    )


def main() -> None:
    capabilities = [int(argument) for argument in sys.argv[1:]]
    wanted = [(capability, index) for capability in capabilities for index, _ in enumerate(variants(capability))]
    with ProcessPoolExecutor() as pool:
        for line in pool.map(compile_one, *zip(*wanted, strict=True)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
