"""One step on the device: from the scheduler's choice to one token per sampled row. Engine thread, current stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from baton.common.sampling import MAX_TOP_LOGPROBS, SamplingParams
from baton.engine.attention.base import AttentionBackend, AttentionMetadata
from baton.engine.batch import Batch, PrefillSegment, ScheduledStep, build_batch
from baton.engine.decode_path import DecodePath
from baton.engine.kv_layout import KVLayout
from baton.engine.layer_groups import LayerGroups, coarser
from baton.engine.logit_edits import LogitEditor
from baton.engine.logprobs import MAX_LOGPROB_ROWS, StepLogprobs
from baton.engine.models.decoder import AfterLayer, Decoder
from baton.engine.prefill_path import PrefillPath
from baton.engine.request import Request
from baton.engine.sampler import TokenSampler
from baton.engine.staging import PendingTokens, make_staging, to_device
from baton.engine.table_mirror import TableMirror

OnLayerGroup = Callable[[int, int, "torch.cuda.Event | None"], None]

# What takes a way, or memory, of its own behind the forward pass.
_PLAIN = SamplingParams(max_tokens=1, top_p=0.9, top_k=50)
_EDITED = SamplingParams(
    max_tokens=1, top_p=0.9, repetition_penalty=1.1, logit_bias=((0, 1.0),), logprobs=MAX_TOP_LOGPROBS
)
_OF_PROMPT = SamplingParams(max_tokens=1, prompt_logprobs=MAX_TOP_LOGPROBS)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """`tokens`: one per request of `step.sampled()`, negative where the logits were not finite."""

    tokens: PendingTokens
    logprobs: StepLogprobs


class Runner:
    """Owns the model, the KV cache and the draws of the step launched last.

    `kv_cache`: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]. Other threads may read blocks that were
    announced to them, after the event that came with the announcement. At most `max_draws` rows are drawn in a step.
    `decode_path` and `prefill_path`, set once by the builder where the device has them, run steps that only decode and
    short ones that hold prompts.
    """

    def __init__(
        self,
        model: Decoder,
        kv_cache: torch.Tensor,
        layout: KVLayout,
        backend: AttentionBackend,
        sampler: TokenSampler,
        max_draws: int,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.layout = layout
        self.vocab_size = model.config.vocab_size
        self.draws = torch.zeros(max_draws, dtype=torch.int64, device=model.device)
        self.decode_path: DecodePath | None = None
        self.prefill_path: PrefillPath | None = None
        self.backend = backend
        self.sampler = sampler
        self._device = model.device
        self._staging = make_staging(model.device, max_draws)
        self._editor = LogitEditor()
        self._tables = TableMirror()

    @property
    def num_blocks(self) -> int:
        return self.kv_cache.shape[2]

    def on_this_thread(self) -> AbstractContextManager[object]:
        """Make the runner's device the calling thread's current one."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def launch(self, step: ScheduledStep, groups: LayerGroups, on_layer_group: OnLayerGroup) -> LaunchedStep:
        """Start a step. After the last layer of each of `groups` has been launched,
        `on_layer_group(layer_start, layer_end, event)` is called; the event fires when it is computed, or later.
        """
        logprobs = StepLogprobs()
        is_plain = all(request.sampling.is_plain for request in step.decodes)
        if self.decode_path is not None and is_plain and self.decode_path.takes(step):
            num_drawn = len(step.decodes)
            self.decode_path.launch(step.decodes)
        else:
            num_drawn = self._launch_with_prompts(step, groups, on_layer_group, logprobs)
        tokens = self._staging.read_back(self.draws[:num_drawn])
        return LaunchedStep(tokens, logprobs)

    def settle(self) -> None:
        """Wait until nothing that was launched still runs. Raises what the device reports."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def profile(self, batch: Batch) -> None:
        """Compute a batch and draw its rows both plainly and in the way that takes the most memory.

        The batch's rows are drawn for position 1. The cache is written.
        """
        count, logprobs = len(batch.sample_rows), StepLogprobs()
        plain, edited = (
            [Request(f"profile{row}", [0], sampling, arrival=0.0) for row in range(count)]
            for sampling in (_PLAIN, _EDITED)
        )
        if count:  # what is kept of requests with penalties stays while other steps are computed
            zeros = torch.zeros((count, self.vocab_size), dtype=self.model.dtype, device=self._device)
            self._draw(zeros, edited, batch.draw_positions)
            del zeros
        hidden, logits = self._forward(batch, None)
        for requests in (plain, edited) if count else ():
            logprobs.add_drawn(logits, self._draw(logits, requests, batch.draw_positions), requests)
        num_rows = min(len(hidden), MAX_LOGPROB_ROWS)
        of_prompt = Request("profile", [0] * (num_rows + 1), _OF_PROMPT, arrival=0.0)
        logprobs.add_prompts(hidden, [(PrefillSegment(of_prompt, 0, num_rows), 0)], self.model.logits)

    def fill_with_nan(self, blocks: Sequence[int]) -> None:
        """Poison blocks, so that a read of what nobody has written shows. For tests: the pool's `on_allocate`."""
        self.kv_cache[:, :, list(blocks)] = torch.nan

    def _copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """On the current stream: behind the steps that wrote the sources, before those that write the copies."""
        sources, targets = (to_device(blocks, torch.int64, self._device) for blocks in zip(*copies, strict=True))
        self.kv_cache.index_copy_(2, targets, self.kv_cache.index_select(2, sources))

    def _launch_with_prompts(
        self, step: ScheduledStep, groups: LayerGroups, on_layer_group: OnLayerGroup, logprobs: StepLogprobs
    ) -> int:
        if self.decode_path is not None:
            self.decode_path.forget_last()
        if step.copies:
            self._copy_blocks(step.copies)
        batch = build_batch(step, self.layout.block_size, self._tables)
        if self.prefill_path is None or not self.prefill_path.takes(step):
            return self._launch_eagerly(step, batch, groups, on_layer_group, logprobs)
        groups = coarser(groups, self.prefill_path.cuts)
        return self.prefill_path.launch(step, batch, self._after_layer(groups, on_layer_group))

    def _launch_eagerly(
        self,
        step: ScheduledStep,
        batch: Batch,
        groups: LayerGroups,
        on_layer_group: OnLayerGroup,
        logprobs: StepLogprobs,
    ) -> int:
        sampled = step.sampled()
        hidden, logits = self._forward(batch, self._after_layer(groups, on_layer_group))
        first_rows = batch.cu_seqlens_q[batch.num_decodes :].tolist()
        logprobs.add_prompts(hidden, list(zip(step.prefills, first_rows, strict=False)), self.model.logits)
        if sampled:
            tokens = self._draw(logits, sampled, batch.draw_positions)
            self.draws[: len(sampled)].copy_(tokens)
            logprobs.add_drawn(logits, tokens, sampled)
        return len(sampled)

    def _forward(self, batch: Batch, after_layer: AfterLayer | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states of all tokens; the model's logits of the sampled ones, if there are any."""
        arrays = (
            batch.input_ids,
            batch.positions,
            batch.cu_seqlens_q,
            batch.context_lens,
            batch.block_tables,
            batch.slot_mapping,
            batch.sample_rows,
            batch.draw_rows,
        )
        input_ids, positions, starts, lens, tables, slots, sample_rows, draw_rows = self._staging.upload(arrays)
        meta = AttentionMetadata(
            cu_seqlens_q=starts,
            context_lens=lens,
            block_tables=tables,
            slot_mapping=slots,
            max_seqlen_q=batch.max_seqlen_q,
            num_prefill_tokens=batch.num_prefill_tokens,
            num_prefills=batch.num_prefills,
            num_decodes=batch.num_decodes,
            fresh_rows=batch.fresh_rows,
        )
        if (batch.draw_rows >= 0).any():
            input_ids[: batch.num_decodes] = self.known_tokens(input_ids[: batch.num_decodes], draw_rows)
        hidden = self.model.forward(input_ids, positions, self.kv_cache, meta, self.backend, after_layer)
        return hidden, self.model.logits(hidden[sample_rows]) if len(sample_rows) else hidden[:0]

    def _draw(self, logits: torch.Tensor, sampled: Sequence[Request], positions: npt.NDArray[np.int64]) -> torch.Tensor:
        edited = self._editor.edit(logits, sampled, positions.tolist(), self.draws)
        return self.sampler.sample(edited, sampled, positions)

    def known_tokens(self, input_ids: torch.Tensor, draw_rows: torch.Tensor) -> torch.Tensor:
        """`input_ids`, where `draw_rows` is not -1 with the draws at these rows instead. int64 [num_decodes] each."""
        # A draw from logits that were not finite is negative; its sequence ends, but this step must not read outside.
        drawn = self.draws[draw_rows.clamp(min=0)].clamp(min=0)
        return torch.where(draw_rows >= 0, drawn, input_ids)

    def _after_layer(self, groups: LayerGroups, on_layer_group: OnLayerGroup) -> AfterLayer:
        start_of_last = {end - 1: start for start, end in groups}

        def after_layer(layer: int) -> None:
            if layer in start_of_last:
                on_layer_group(start_of_last[layer], layer + 1, self._record_event())

        return after_layer

    def _record_event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
