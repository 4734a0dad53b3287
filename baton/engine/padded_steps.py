"""Short steps that hold prompts, computed on buffers of fixed size and place: all that a captured graph of them needs.

The forward pass is that of any step; rows, sequences and tables beyond the step's own are padding. Owned by who
captures the passes; engine thread, current stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from baton.engine.attention.base import AttentionMetadata
from baton.engine.batch import Batch, ScheduledStep, build_batch
from baton.engine.models.decoder import AfterLayer
from baton.engine.padded_layout import Bucket, Buckets, PaddedLayout
from baton.engine.runner import Runner
from baton.engine.staging import make_staging

Greedy = Callable[[torch.Tensor, torch.Tensor], None]


class PaddedSteps:
    """`fill` a step, `compute` its bucket (or replay what was captured of that), `draw` what is not greedy.

    `greedy(logits, out)` sets out[row] to the id of the row's largest logit, -1 where it is not finite.
    """

    def __init__(self, runner: Runner, greedy: Greedy, max_tokens: int, max_num_seqs: int, max_blocks: int) -> None:
        device = runner.model.device
        self._runner = runner
        self._greedy = greedy
        self._staging = make_staging(device, 0)
        self._buckets = Buckets(max_tokens, max_num_seqs)
        max_draws = len(runner.draws)
        self._layouts = {bucket: PaddedLayout(bucket, max_draws) for bucket in self._buckets.largest_first}
        num_words = max(layout.num_words for layout in self._layouts.values())
        num_seqs = max(bucket.num_seqs for bucket in self._layouts)
        num_draws = max(layout.num_draws for layout in self._layouts.values())
        self._words = torch.zeros(num_words, dtype=torch.int64, device=device)
        self._tables = torch.zeros((num_seqs, max_blocks), dtype=torch.int32, device=device)
        self._logits = torch.zeros((num_draws, runner.vocab_size), dtype=runner.model.dtype, device=device)

    @property
    def buckets(self) -> list[Bucket]:
        """Largest first."""
        return list(self._layouts)

    def takes(self, step: ScheduledStep) -> bool:
        """Whether there is a bucket for it, and its tokens need nothing of their logits but a draw."""
        return self._bucket_of(step) is not None and all(
            request.sampling.is_plain and not request.wants_prompt_logprobs for request in step.requests()
        )

    def fill(self, step: ScheduledStep, batch: Batch) -> Bucket:
        """Make the buffers say what `batch` says, which lays out a step that is taken; the step's bucket."""
        bucket = self._bucket_of(step)
        assert bucket is not None
        words = self._layouts[bucket].pack(batch)
        on_device, tables = self._staging.upload((words, batch.block_tables))
        self._words[: len(on_device)].copy_(on_device)
        decodes, width = batch.num_decodes, batch.block_tables.shape[1]
        if decodes:
            self._tables[:decodes, :width].copy_(tables[:decodes])
        first = bucket.num_decodes
        self._tables[first : first + batch.num_prefills, :width].copy_(tables[decodes:])
        return bucket

    def clear(self, bucket: Bucket) -> None:
        """Make the buffers say that there is nothing to compute or store."""
        words = self._layouts[bucket].pack(build_batch(ScheduledStep(), self._runner.layout.block_size))
        (on_device,) = self._staging.upload((words,))
        self._words[: len(on_device)].copy_(on_device)

    def compute(self, bucket: Bucket, after_layer: AfterLayer | None = None) -> torch.Tensor:
        """Compute what the buffers say; the first draws become those of the largest logits.

        Returns the logits of the rows that are drawn, valid until the next call: [num_draws, vocab_size]. Touches
        nothing but memory, so that it can be captured and replayed for other steps of the bucket.
        """
        layout, runner = self._layouts[bucket], self._runner
        fields = layout.fields(self._words, torch.int32)
        meta = AttentionMetadata(
            cu_seqlens_q=fields.cu_seqlens_q,
            context_lens=fields.context_lens,
            block_tables=self._tables[: bucket.num_seqs],
            slot_mapping=fields.slot_mapping,
            max_seqlen_q=bucket.num_tokens,
            num_prefill_tokens=bucket.num_tokens,
            num_prefills=bucket.num_prefills,
            num_decodes=bucket.num_decodes,
            is_padded=True,
        )
        input_ids = fields.input_ids
        if bucket.num_decodes:
            decoded = input_ids[: bucket.num_decodes]
            decoded.copy_(runner.known_tokens(decoded, fields.draw_rows))
        positions, cache = fields.positions, runner.kv_cache
        hidden = runner.model.forward(input_ids, positions, cache, meta, runner.backend, after_layer)
        logits = self._logits[: layout.num_draws]
        logits.copy_(runner.model.logits(hidden[fields.sample_rows]))
        self._greedy(logits, runner.draws[: layout.num_draws])
        return logits

    def draw(self, step: ScheduledStep, batch: Batch, logits: torch.Tensor) -> int:
        """Draw from what `compute` returned for the step where its largest logits are not wanted; how many draws."""
        sampled = step.sampled()
        if any(request.sampling.temperature > 0 for request in sampled):
            tokens = self._runner.sampler.sample(logits[: len(sampled)], sampled, batch.draw_positions)
            self._runner.draws[: len(sampled)].copy_(tokens)
        return len(sampled)

    def _bucket_of(self, step: ScheduledStep) -> Bucket | None:
        if not step.prefills:
            return None
        decodes = len(step.decodes)
        return self._buckets.find(decodes + step.num_prefill_tokens, decodes, len(step.prefills))
