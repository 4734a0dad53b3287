"""Prompt segments without a cached prefix: causal attention over the new keys and values alone, through cuDNN's SDPA.

cuDNN builds a plan per shape, which takes far longer than to run it, so segments are padded to a few lengths. Causality
keeps the padding out of every real row. Whether this pays against the paged kernel is a matter of measured rates, kept
in the tuning table.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from baton.engine.attention.base import AttentionMetadata
from baton.engine.kernels.tuning import DenseConfig, Tuning


def padded_length(num_tokens: int, step: int) -> int:
    return -(-num_tokens // step) * step


class DensePrefill:
    """Owned by the Triton backend. Keeps nothing between calls."""

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning

    def pays(self, q: torch.Tensor, meta: AttentionMetadata) -> bool:
        """Whether every prefill segment is fresh and together they are faster here than in the paged kernel."""
        config = self._tuning.dense(q.shape[2], q.dtype)
        return config is not None and bool(meta.fresh_rows) and _pays(config, meta.fresh_rows)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        rows: tuple[tuple[int, int], ...],
        scale: float,
    ) -> torch.Tensor:
        """The attention of `rows` in place of those of `out`. q, out: [num_tokens, num_heads, head_dim]; k, v likewise.

        Returns `out`, or a tensor of its shape where one segment is the whole batch: that saves a copy.
        """
        config = self._tuning.dense(q.shape[2], q.dtype)
        assert config is not None
        for start, end in rows:
            length = padded_length(end - start, config.step)
            dense_q, dense_k, dense_v = (_padded(x[start:end], length).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                found = scaled_dot_product_attention(
                    dense_q, dense_k, dense_v, is_causal=True, scale=scale, enable_gqa=True
                )
            attended = found[0].transpose(0, 1)[: end - start]
            if len(attended) == len(out):
                return attended
            out[start:end] = attended
        return out


@lru_cache(maxsize=64)  # asked for every layer of a step
def _pays(config: DenseConfig, rows: tuple[tuple[int, int], ...]) -> bool:
    lengths = [end - start for start, end in rows]
    if min(lengths) < config.min_tokens or max(lengths) > config.max_tokens:
        return False
    work = sum(length * length for length in lengths)
    padded_work = sum(padded_length(length, config.step) ** 2 for length in lengths)
    return padded_work < config.speedup * work


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    """[length, num_heads, head_dim]; the padding is zero, because garbage could be NaN."""
    if len(x) == length:
        return x
    padded = torch.zeros((length, *x.shape[1:]), dtype=x.dtype, device=x.device)
    padded[: len(x)] = x
    return padded
