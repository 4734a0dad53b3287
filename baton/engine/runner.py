"""One forward pass: from a batch of arrays to one token per sampled row. Engine thread, its device's current stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch

from baton.common.sampling import SamplingParams
from baton.engine.attention.base import AttentionBackend, AttentionMetadata
from baton.engine.batch import Batch
from baton.engine.kv_layout import KVLayout
from baton.engine.models.decoder import Decoder
from baton.engine.request import Request
from baton.engine.sampler import SamplingRows, sample, sampling_rows

LayerGroups = Sequence[tuple[int, int]]
OnLayerGroup = Callable[[int, int, "torch.cuda.Event | None"], None]


class Runner:
    """Owns the model and the KV cache.

    `kv_cache`: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]. Other threads may read blocks that were
    announced to them, after the event that came with the announcement.
    """

    def __init__(self, model: Decoder, kv_cache: torch.Tensor, layout: KVLayout, backend: AttentionBackend) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.layout = layout
        self.vocab_size = model.config.vocab_size
        self._backend = backend
        self._device = model.device

    @property
    def num_blocks(self) -> int:
        return self.kv_cache.shape[2]

    def on_this_thread(self) -> AbstractContextManager[object]:
        """Make the runner's device the calling thread's current one."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def run(
        self, batch: Batch, sampled: Sequence[Request], groups: LayerGroups, on_layer_group: OnLayerGroup
    ) -> list[int]:
        """Compute a batch; returns one token per row of `batch.sample_rows`, which belong to `sampled`.

        A token is negative where the logits were not finite. After the last layer of each of `groups` has been
        launched, `on_layer_group(layer_start, layer_end, event)` is called; the event fires when it is computed.
        """
        hidden = self._forward(batch, self._after_layer(groups, on_layer_group) if groups else None)
        if not sampled:
            return []
        tokens = self._sample(hidden, batch, sampling_rows(sampled, self.vocab_size, self._device))
        return [int(token) for token in tokens.tolist()]

    @torch.inference_mode()
    def profile(self, batch: Batch) -> None:
        """Compute a batch and draw its rows in the way that takes the most memory. The cache is written."""
        example = Request("profile", [0], SamplingParams(max_tokens=1, top_p=0.9, top_k=50), arrival=0.0)
        rows = sampling_rows([example] * len(batch.sample_rows), self.vocab_size, self._device)
        self._sample(self._forward(batch, None), batch, rows)

    def _forward(self, batch: Batch, after_layer: Callable[[int], None] | None) -> torch.Tensor:
        input_ids, positions = self._tensor(batch.input_ids), self._tensor(batch.positions)
        meta = self._metadata(batch)
        return self.model.forward(input_ids, positions, self.kv_cache, meta, self._backend, after_layer)

    def _sample(self, hidden: torch.Tensor, batch: Batch, rows: SamplingRows) -> torch.Tensor:
        return sample(self.model.logits(hidden[self._tensor(batch.sample_rows)]), rows)

    def fill_with_nan(self, blocks: Sequence[int]) -> None:
        """Poison blocks, so that a read of what nobody has written shows. For tests: the pool's `on_allocate`."""
        self.kv_cache[:, :, list(blocks)] = torch.nan

    def _after_layer(self, groups: LayerGroups, on_layer_group: OnLayerGroup) -> Callable[[int], None]:
        start_of_last = {end - 1: start for start, end in groups}

        def after_layer(layer: int) -> None:
            if layer in start_of_last:
                on_layer_group(start_of_last[layer], layer + 1, self._record_event())

        return after_layer

    def _record_event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def _metadata(self, batch: Batch) -> AttentionMetadata:
        return AttentionMetadata(
            cu_seqlens_q=self._tensor(batch.cu_seqlens_q),
            context_lens=self._tensor(batch.context_lens),
            block_tables=self._tensor(batch.block_tables),
            slot_mapping=self._tensor(batch.slot_mapping),
            max_seqlen_q=batch.max_seqlen_q,
            num_prefill_tokens=batch.num_prefill_tokens,
            num_prefills=batch.num_prefills,
            num_decodes=batch.num_decodes,
        )

    def _tensor(self, array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> torch.Tensor:
        # From pageable memory: such a copy has left the array before it returns, so the array may be reused.
        return torch.from_numpy(array).to(self._device, non_blocking=True)
