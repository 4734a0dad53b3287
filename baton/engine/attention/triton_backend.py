"""Attention through the Triton kernels: the backend of GPU workers. Stateless but for the device's tuning table.

Launches on the current stream, never synchronises; `attend` is legal in a CUDA graph as long as the batch holds decode
rows only or is padded.
"""

from __future__ import annotations

import torch

from baton.engine.attention.base import AttentionMetadata
from baton.engine.attention.dense import DensePrefill
from baton.engine.kernels.decode_attention import decode_attention
from baton.engine.kernels.prefill_attention import prefill_attention
from baton.engine.kernels.rope_store import rope_and_store
from baton.engine.kernels.tuning import Tuning


class TritonBackend:
    """Implements `AttentionBackend` on one device."""

    def __init__(self, device: torch.device) -> None:
        self._tuning = Tuning.of(device)
        self._dense = DensePrefill(self._tuning)

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
        rope_and_store(q, k, v, positions, cos_sin, layer_kv, meta.slot_mapping)

    def uses_dense(self, q: torch.Tensor, meta: AttentionMetadata) -> bool:
        """Whether the prefill segments of such a step go to dense attention."""
        return meta.num_prefills > 0 and self._dense.pays(q, meta)

    def attend(
        self,
        q: torch.Tensor,
        layer_kv: torch.Tensor,
        meta: AttentionMetadata,
        scale: float,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        num_kv_heads, head_dim = layer_kv.shape[3:]
        # Decodes first: the rows of those that are not there in a padded batch belong to prefills.
        if meta.num_decodes:
            config = self._tuning.decode(head_dim, num_kv_heads, q.dtype)
            decode_attention(q, layer_kv, out, meta.context_lens, meta.block_tables, meta.num_decodes, scale, config)
        if fresh is not None and self.uses_dense(q, meta):
            return self._dense.attend(q, *fresh, out, meta.fresh_rows, scale)
        if meta.num_prefills:
            prefill_attention(
                q,
                layer_kv,
                out,
                meta.cu_seqlens_q,
                meta.context_lens,
                meta.block_tables,
                meta.num_decodes,
                meta.max_seqlen_q,
                scale,
                self._tuning.prefill(head_dim, q.dtype),
                meta.num_prefill_tokens if meta.is_padded else 0,
            )
        return out
