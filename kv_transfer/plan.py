"""Which KV goes in which message: who sends what between workers of several ranks, and segments that fit a slot.

Owns no state and imports no torch. `reshard` gives the pairs of ranks that exchange heads and layers when the two ends
are sharded differently; the prefill half plans with it what it sends to a peer (`shares_between`), and cuts each layer
group that its engine has written accordingly (`messages_of`). Workers have one rank today, so the plan is one share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from kv_transfer.messages import Segment

_MANY = 4  # messages, of which the ends are made shorter


def split_segments(
    layer_start: int, layer_end: int, block_start: int, block_end: int, block_bytes_per_layer: int, slot_bytes: int
) -> list[Segment]:
    """Cut a rectangle of KV into segments of at most `slot_bytes`.

    Layers stay together while one block of all of them fits. Blocks are shared out evenly, or see `_tapered_ranges`.
    Raises ValueError when not even one block of one layer fits, or when the rectangle is empty.
    """
    num_layers, num_blocks = layer_end - layer_start, block_end - block_start
    if num_layers < 1 or num_blocks < 1:
        raise ValueError(f"no KV in layers [{layer_start}, {layer_end}), blocks [{block_start}, {block_end})")
    capacity = slot_bytes // block_bytes_per_layer
    if capacity < 1:
        raise ValueError(f"a slot of {slot_bytes} bytes is smaller than one block of a layer, {block_bytes_per_layer}")
    segments = []
    for layers in _even_ranges(layer_start, layer_end, -(-num_layers // capacity)):
        blocks_per_message = capacity // (layers[1] - layers[0])
        for blocks in _tapered_ranges(block_start, block_end, blocks_per_message):
            segments.append(Segment(*layers, *blocks))
    return segments


def _tapered_ranges(start: int, end: int, largest: int) -> list[tuple[int, int]]:
    """[start, end) as ranges of at most `largest`. Where there are many the first and the last are short.

    For the wire waits for the pack of the first, and the admission for the unpack of the last.
    """
    short = largest // 4
    if short == 0 or end - start <= _MANY * largest:
        return _even_ranges(start, end, -(-(end - start) // largest))
    inner = _even_ranges(start + short, end - short, -(-(end - start - 2 * short) // largest))
    return [(start, start + short), *inner, (end - short, end)]


def _even_ranges(start: int, end: int, parts: int) -> list[tuple[int, int]]:
    """[start, end) as `parts` ranges whose lengths differ by at most one, the longer ones first."""
    size, longer = divmod(end - start, parts)
    bounds = [start]
    for part in range(parts):
        bounds.append(bounds[-1] + size + (part < longer))
    return list(pairwise(bounds))


class Shard(NamedTuple):
    """What one rank holds: KV heads [head_start, head_end) of layers [layer_start, layer_end)."""

    layer_start: int
    layer_end: int
    head_start: int
    head_end: int


@dataclass(frozen=True, slots=True)
class Sharding:
    """How the ranks of one worker share the KV. Rank = pipeline stage * tensor_parallel + tensor rank.

    With fewer KV heads than tensor ranks, each head is held by tensor_parallel / num_kv_heads neighbouring ranks.
    """

    tensor_parallel: int
    pipeline_parallel: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def shard(self, rank: int, num_layers: int, num_kv_heads: int) -> Shard:
        """What `rank` holds. Raises ValueError when the model cannot be shared like this."""
        self._check(num_layers, num_kv_heads)
        stage, tensor_rank = divmod(rank, self.tensor_parallel)
        layers = _even_ranges(0, num_layers, self.pipeline_parallel)[stage]
        if self.tensor_parallel >= num_kv_heads:
            head = tensor_rank // (self.tensor_parallel // num_kv_heads)
            return Shard(*layers, head, head + 1)
        heads = num_kv_heads // self.tensor_parallel
        return Shard(*layers, tensor_rank * heads, (tensor_rank + 1) * heads)

    def _check(self, num_layers: int, num_kv_heads: int) -> None:
        if self.tensor_parallel < 1 or not 1 <= self.pipeline_parallel <= num_layers:
            raise ValueError(f"{num_layers} layers cannot be shared by {self}")
        if num_kv_heads % self.tensor_parallel and self.tensor_parallel % num_kv_heads:
            raise ValueError(f"{num_kv_heads} KV heads cannot be shared by {self.tensor_parallel} tensor ranks")


ONE_RANK = Sharding(1)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Rank `source` of one worker sends `shard` to rank `target` of the other."""

    source: int
    target: int
    shard: Shard


def reshard(source: Sharding, target: Sharding, num_layers: int, num_kv_heads: int) -> list[Transfer]:
    """Who sends what, so that every target rank gets each (layer, head) of its shard exactly once.

    Where several source ranks hold the same heads, the targets that need them take turns.
    """
    replicas = _replicas(source, num_layers, num_kv_heads)
    sent = dict.fromkeys(replicas, 0)
    transfers = []
    for rank in range(target.num_ranks):
        wanted = target.shard(rank, num_layers, num_kv_heads)
        for held, ranks in replicas.items():
            common = _intersection(wanted, held)
            if common is not None:
                transfers.append(Transfer(ranks[sent[held] % len(ranks)], rank, common))
                sent[held] += 1
    return transfers


def shares_between(
    source: Sharding, source_rank: int, target: Sharding, target_rank: int, num_layers: int, num_kv_heads: int
) -> list[Shard]:
    """What the one rank sends to the other. Raises ValueError for a part of the heads: blocks travel with all."""
    transfers = reshard(source, target, num_layers, num_kv_heads)
    shards = [one.shard for one in transfers if (one.source, one.target) == (source_rank, target_rank)]
    parts = [shard for shard in shards if (shard.head_start, shard.head_end) != (0, num_kv_heads)]
    if parts:
        raise ValueError(f"a share of {parts[0]} takes a packer that cuts {num_kv_heads} KV heads")
    return shards


def messages_of(
    shares: Sequence[Shard], written: Segment, block_bytes_per_layer: int, slot_bytes: int
) -> list[Segment]:
    """The segments in which `written` travels, as far as the shares hold it."""
    segments = []
    for share in shares:
        start, end = max(written.layer_start, share.layer_start), min(written.layer_end, share.layer_end)
        if start < end:
            segments += split_segments(
                start, end, written.block_start, written.block_end, block_bytes_per_layer, slot_bytes
            )
    return segments


def _replicas(sharding: Sharding, num_layers: int, num_kv_heads: int) -> dict[Shard, list[int]]:
    """The ranks that hold each distinct shard. Distinct shards do not overlap."""
    replicas: dict[Shard, list[int]] = {}
    for rank in range(sharding.num_ranks):
        replicas.setdefault(sharding.shard(rank, num_layers, num_kv_heads), []).append(rank)
    return replicas


def _intersection(a: Shard, b: Shard) -> Shard | None:
    common = Shard(
        max(a.layer_start, b.layer_start),
        min(a.layer_end, b.layer_end),
        max(a.head_start, b.head_start),
        min(a.head_end, b.head_end),
    )
    return common if common.layer_start < common.layer_end and common.head_start < common.head_end else None
