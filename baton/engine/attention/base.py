"""What an attention backend is given and must do. The runner builds one `AttentionMetadata` per step; models call the
backend twice per layer, on the engine thread and the current stream.

Order of a batch: the decode rows first (one token each), then the prefill segments, each contiguous. So sequence `i`
of the first `num_decodes` owns token row `i`, and `num_tokens == num_decodes + num_prefill_tokens`.

Padding is a decode row with context length 0 and slot -1: nothing is stored for it and its output is zero. Its position
must still be a valid row of the rotary table; its block table may hold anything.

In a padded batch (`is_padded`) the numbers of sequences and tokens are upper bounds, and what there is of them is known
on the device only. Decodes that are not there have context length 0 and no row in `cu_seqlens_q`: prefill rows follow
the last decode that is there. Segments that are not there have no row either. Rows beyond the last segment have slot -1
and a valid position, and their output is anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Who attends to what in one step. All tensors lie on the device of the model.

    cu_seqlens_q: int32 [num_seqs + 1], first token row of each sequence (decode rows count one each)
    context_lens: int32 [num_seqs], KV length of a sequence including the new tokens of this step
    block_tables: int32 [num_seqs, max_blocks], max_blocks >= 1, physical blocks; entries past the context are not used
    slot_mapping: int64 [num_tokens], block * block_size + offset of a token; -1: not stored
    max_seqlen_q: longest prefill segment (1 when there is none); an upper bound is enough
    fresh_rows: token rows [start, end) of every prefill segment, if none of them has a context before it; else empty
    is_padded: see above; `num_prefill_tokens` is then at least the number of all new tokens
    """

    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    max_seqlen_q: int
    num_prefill_tokens: int
    num_prefills: int
    num_decodes: int
    fresh_rows: tuple[tuple[int, int], ...] = ()
    is_padded: bool = False

    @property
    def num_seqs(self) -> int:
        return self.num_decodes + self.num_prefills

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_prefill_tokens


class AttentionBackend(Protocol):
    """Rotary embedding, KV store and paged attention of one layer.

    Shapes: q [num_tokens, num_heads, head_dim]; k, v [num_tokens, num_kv_heads, head_dim] (views of a fused product are
    fine: only the last dimension must be contiguous); layer_kv [2, num_blocks, block_size, num_kv_heads, head_dim].
    `num_heads` is a multiple of `num_kv_heads`; query head h reads KV head h // (num_heads // num_kv_heads).
    """

    def rope_and_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        layer_kv: torch.Tensor,
        meta: AttentionMetadata,
    ) -> None:
        """Rotate q and k in place (Llama's rotate-half), then write k and v to the slots of `meta.slot_mapping`.

        positions: integer [num_tokens]. cos_sin: float32 [max_positions, head_dim], cosines in the first half of a row,
        sines in the second.
        """
        ...

    def attend(
        self,
        q: torch.Tensor,
        layer_kv: torch.Tensor,
        meta: AttentionMetadata,
        scale: float,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Causal attention of the new tokens over their context in the cache: [num_tokens, num_heads, head_dim].

        `fresh`: k and v of the new tokens as they were stored, for a backend that has a faster way over them alone.
        """
        ...
