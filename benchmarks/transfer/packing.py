"""Packing and unpacking of one full slot, with and without fingerprints, on the worker's own KV cache."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

from baton.engine.kv_layout import KVLayout
from kv_transfer.device_clock import timing_event
from kv_transfer.fingerprint import block_salts
from kv_transfer.messages import LeaseKey, Segment
from kv_transfer.packing import make_packer

_REPEATS = 20


def pack_seconds(kv_cache: torch.Tensor, layout: KVLayout, slot_bytes: int, layers: int) -> dict[str, float]:
    """Seconds for one segment of `layers` layers that fills a slot: through the packer, and as a bare copy.

    `call`: what a transfer thread spends on one pack, reading the fingerprints included. The blocks lie scattered in
    the cache, so the worker must be idle.
    """
    num_blocks = min(slot_bytes // (layers * layout.block_bytes_per_layer), kv_cache.shape[2] // 2)
    segment = Segment(0, layers, 0, num_blocks)
    block_ids = random.Random(0).sample(range(kv_cache.shape[2]), num_blocks)
    num_bytes = layout.segment_bytes(layers, num_blocks)
    out = torch.zeros(num_bytes, dtype=torch.uint8, device=kv_cache.device)
    salts = block_salts(LeaseKey(1, 1), 0, segment)
    packer = make_packer(kv_cache.device)
    fingerprints = packer.start_pack(kv_cache, segment, block_ids, out, salts).wait()
    ids = torch.tensor(block_ids, device=kv_cache.device)
    source = kv_cache[:layers]
    packed = out.view(kv_cache.dtype).view(layers, 2, num_blocks, *kv_cache.shape[3:])

    def unpack() -> None:
        if not packer.start_unpack(kv_cache, segment, block_ids, out, salts, fingerprints).wait():
            raise RuntimeError("a packed segment does not verify")

    return {
        "bytes": float(num_bytes),
        "blocks": float(num_blocks),
        "pack_call": _median(
            lambda: packer.start_pack(kv_cache, segment, block_ids, out, salts).wait(), kv_cache.device
        ),
        "unpack_call": _median(unpack, kv_cache.device),
        "gather_call": _median(lambda: torch.index_select(source, 2, ids, out=packed), kv_cache.device),
        "scatter_call": _median(lambda: source.index_copy_(2, ids, packed), kv_cache.device),
    }


def _median(call: Callable[[], object], device: torch.device) -> float:
    """Of some calls; on a GPU the device's time from the first launch of a call to the end of its last."""
    times = []
    with torch.inference_mode():
        for _ in range(_REPEATS):
            times.append(_cuda_seconds(call) if device.type == "cuda" else _host_seconds(call))
    return statistics.median(times)


def _cuda_seconds(call: Callable[[], object]) -> float:
    start, end = timing_event(), timing_event()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _host_seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
