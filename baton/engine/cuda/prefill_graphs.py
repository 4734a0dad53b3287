"""Short steps that hold prompts, as captured CUDA graphs: one per bucket. Imported by name, on a GPU only.

Launched kernel by kernel, such a step takes the host longer than the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch

from baton.engine.batch import Batch, ScheduledStep
from baton.engine.cuda.graph_pool import Captured, Compute, Cut, GraphPool
from baton.engine.layer_groups import cuts_of
from baton.engine.models.decoder import AfterLayer
from baton.engine.padded_layout import Bucket
from baton.engine.padded_steps import PaddedSteps

logger = logging.getLogger(__name__)


class PrefillGraphs:
    """Implements `PrefillPath`."""

    def __init__(self, steps: PaddedSteps, pool: GraphPool, num_layers: int) -> None:
        self.cuts = cuts_of(num_layers)
        self._steps = steps
        self._pool = pool
        self._captured: dict[Bucket, Captured] = {}

    @torch.inference_mode()
    def measure(self) -> int:
        largest = (compute for _, compute in islice(self._computes(), 2))
        return self._pool.measure(largest, len(self._steps.buckets))

    @torch.inference_mode()
    def prepare(self) -> None:
        started = time.monotonic()
        for bucket, compute in self._computes():
            self._captured[bucket] = self._pool.capture(compute)
        logger.info("%d prefill graphs captured in %.1f s", len(self._captured), time.monotonic() - started)

    def _computes(self) -> Iterator[tuple[Bucket, Compute]]:
        """The largest first; the buffers say nothing while each is called."""
        for bucket in self._steps.buckets:
            self._steps.clear(bucket)
            yield bucket, partial(self._compute, bucket)

    def _compute(self, bucket: Bucket, cut: Cut) -> torch.Tensor:
        return self._steps.compute(bucket, lambda layer: cut() if layer + 1 in self.cuts else None)

    def takes(self, step: ScheduledStep) -> bool:
        return bool(self._captured) and self._steps.takes(step)

    def launch(self, step: ScheduledStep, batch: Batch, after_layer: AfterLayer) -> int:
        captured = self._captured[self._steps.fill(step, batch)]
        captured.replay(lambda index: after_layer(self.cuts[index] - 1) if index < len(self.cuts) else None)
        return self._steps.draw(step, batch, captured.output)
