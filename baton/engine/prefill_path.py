"""What the runner asks of a faster way for short steps that hold prompts. A CPU has none."""

from __future__ import annotations

from typing import Protocol

from baton.engine.batch import Batch, ScheduledStep
from baton.engine.models.decoder import AfterLayer


class PrefillPath(Protocol):
    """Engine thread, current stream, inference mode. Reads and writes the runner's draws.

    `cuts`: after how many layers, in rising order and at last all, the runner can be told that they are launched.
    """

    cuts: tuple[int, ...]

    def measure(self) -> int:
        """Bytes that `prepare` will take on the device, found by preparing a part. Before `prepare`."""
        ...

    def prepare(self) -> None:
        """Get ready for every size of step. Once, before the first `launch`."""
        ...

    def takes(self, step: ScheduledStep) -> bool:
        """Whether `launch` can run this step."""
        ...

    def launch(self, step: ScheduledStep, batch: Batch, after_layer: AfterLayer) -> int:
        """Start the step, which `batch` lays out; how many tokens it draws. The first rows of the draws hold them when
        it has run. `after_layer` is called with the last layer before each of the cuts when all up to it is launched.
        """
        ...
