"""Steps that hold prompts, in a few sizes: upper bounds of what a step has, and its arrays at places that depend on
nothing else. Used by `padded_steps`; no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.engine.batch import Batch

MAX_PREFILLS = 16
_MIXED_STEP = 128
_FEW_DECODES = 32
_WORDS = 2  # 8-byte words of the alignment that kernels are compiled for


@dataclass(frozen=True, slots=True)
class Bucket:
    """A step has at most so many tokens in all, sequences that decode and segments of prompts."""

    num_tokens: int
    num_decodes: int
    num_prefills: int

    @property
    def num_seqs(self) -> int:
        return self.num_decodes + self.num_prefills


@dataclass(frozen=True, slots=True)
class Fields:
    """Arrays or tensors as in `Batch`, of a bucket's size; `draw_rows` one per decode."""

    input_ids: Any
    positions: Any
    slot_mapping: Any
    sample_rows: Any
    draw_rows: Any
    cu_seqlens_q: Any
    context_lens: Any


class Buckets:
    """The sizes for steps of at most `max_tokens` tokens, and which of them a step takes.

    Steps without decodes and steps with few have their own: a decode that is not there costs time, too. Those without
    are finer, because a lone prompt that waits for nobody else feels the padding most.
    """

    def __init__(self, max_tokens: int, max_num_seqs: int) -> None:
        sizes = [*range(64, 512, 64), *range(512, 1024, 128), *range(1024, max_tokens, 256)]
        sizes = [*(size for size in sizes if size < max_tokens), max_tokens]
        prefills = min(MAX_PREFILLS, max_num_seqs)
        mixed = [size for size in sizes if size % _MIXED_STEP == 0 or size == max_tokens]
        self._by_decodes = {0: [Bucket(size, 0, min(size, prefills)) for size in sizes]}
        for decodes in sorted({min(_FEW_DECODES, max_num_seqs), max_num_seqs}):
            self._by_decodes[decodes] = [Bucket(size, min(size, decodes), min(size, prefills)) for size in mixed]

    @property
    def largest_first(self) -> list[Bucket]:
        every = {bucket for buckets in self._by_decodes.values() for bucket in buckets}
        return sorted(every, key=lambda bucket: (bucket.num_tokens, bucket.num_decodes), reverse=True)

    def find(self, num_tokens: int, num_decodes: int, num_prefills: int) -> Bucket | None:
        """The smallest that holds such a step; None where it is too large."""
        buckets = next((found for most, found in self._by_decodes.items() if num_decodes <= most), [])
        index = bisect_left(buckets, num_tokens, key=lambda bucket: bucket.num_tokens)
        if index == len(buckets):
            return None
        bucket = buckets[index]
        return bucket if num_decodes <= bucket.num_decodes and num_prefills <= bucket.num_prefills else None


class PaddedLayout:
    """Where the arrays of one bucket's steps lie in a row of 8-byte words. At most `max_draws` tokens are drawn."""

    def __init__(self, bucket: Bucket, max_draws: int) -> None:
        self.bucket = bucket
        self.num_draws = min(bucket.num_seqs, max_draws)
        n = bucket.num_tokens
        self._wide = (n, n, n, self.num_draws, bucket.num_decodes)
        self._narrow = (bucket.num_seqs + 1, bucket.num_seqs)
        words = [*self._wide, *(-(-count // 2) for count in self._narrow)]
        self._starts = list(accumulate((-(-count // _WORDS) * _WORDS for count in words), initial=0))

    @property
    def num_words(self) -> int:
        return self._starts[-1]

    def fields(self, words: Any, narrow_type: Any) -> Fields:
        """Views of `words`, a 64-bit array or tensor; `narrow_type` is its library's type of 32-bit integers."""
        spans = list(pairwise(self._starts))
        wide = [words[start : start + count] for (start, _), count in zip(spans, self._wide, strict=False)]
        narrow = [
            words[start:end].view(narrow_type)[:count]
            for (start, end), count in zip(spans[len(wide) :], self._narrow, strict=True)
        ]
        return Fields(*wide, *narrow)

    def pack(self, batch: Batch) -> npt.NDArray[np.int64]:
        """The step's arrays, padded: rows that are not there are stored nowhere and belong to no sequence."""
        words = np.zeros(self.num_words, dtype=np.int64)
        out = self.fields(words, np.int32)
        n, decodes, prefills = len(batch.input_ids), batch.num_decodes, batch.num_prefills
        out.input_ids[:n] = batch.input_ids
        out.positions[:n] = batch.positions
        out.slot_mapping[:] = -1
        out.slot_mapping[:n] = batch.slot_mapping
        out.sample_rows[: len(batch.sample_rows)] = batch.sample_rows
        out.draw_rows[:] = -1
        out.draw_rows[:decodes] = batch.draw_rows
        first = self.bucket.num_decodes
        out.cu_seqlens_q[: decodes + 1] = batch.cu_seqlens_q[: decodes + 1]
        out.cu_seqlens_q[decodes + 1 : first] = decodes
        out.cu_seqlens_q[first : first + prefills + 1] = batch.cu_seqlens_q[decodes:]
        out.cu_seqlens_q[first + prefills + 1 :] = n
        out.context_lens[:decodes] = batch.context_lens[:decodes]
        out.context_lens[first : first + prefills] = batch.context_lens[decodes:]
        return words
